"""What a plan will do, before it does it: who holds how much, how much noise, how many bytes, about how long."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from cotune.client.noise_calibration import planned_charges, planned_steps
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, statistic_shapes
from cotune.privacy.accounting.composition import epsilon
from cotune.privacy.claimed_guarantee import Figures, compute_figures, max_figures
from cotune.privacy.config import RecordPrivacy
from cotune.protocol.changes import RoundChange
from cotune.protocol.messages import Recipient, encode_update, payload_bytes, state_digest
from cotune.reporting.privacy_statement import client_statement
from cotune.server.rounds.round_requests import RoundRequests
from cotune.server.rounds.strategy_step import begin_round
from cotune.server.runs.client_privacy import compute_round_noise
from cotune.simulations.forecast.members import Expected, Member, NewPolicy, build_members, get_members, new_policy
from cotune.simulations.forecast.timing import Estimate, estimate
from cotune.simulations.prepare import prepare
from cotune.strategies.types import Update


@dataclass(frozen=True)
class OrganizationForecast:
    """What an organization will do; the privacy figures are None without privacy.

    Attributes:
        examples: Its units of privacy.
        batch: Expected records per step.
        steps: Of all rounds.
        noise_multiplier: σ.
    """

    name: str
    examples: int
    batch: float
    steps: int
    noise_multiplier: float | None
    epsilon_allowed: float | None
    epsilon_planned: float | None
    delta: float | None
    figures: Figures | None = None


@dataclass(frozen=True)
class StageForecast:
    """What a stage will do.

    Attributes:
        steps: In one round, of the organization that takes most.
        parameters: That are trained and travel.
        bytes_up: Of one round, all organizations together.
        bytes_down: Likewise; with `wire_down`, where all have the version before.
    """

    mode: str
    rounds: int
    steps: int
    parameters: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class ClientForecast:
    """Of client-level privacy. noise, signal: norms in one round's mean, of the noise and, at most, of what it should hide."""

    epsilon_planned: float
    noise_multiplier: float
    expected_organizations: float
    noise: float
    signal: float
    statement: tuple[str, ...]


@dataclass(frozen=True)
class Forecast:
    """The whole plan.

    Attributes:
        test_examples: None where no records were read.
        time: How long a simulation takes on this machine; None where no records were read.
        new_policy: What the policy of a new site says to the plan.
        notes: About records and classes.
    """

    plan: Plan
    test_examples: int | None
    organizations: tuple[OrganizationForecast, ...]
    stages: tuple[StageForecast, ...]
    time: Estimate | None
    new_policy: NewPolicy
    client_privacy: ClientForecast | None = None
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> Figures | None:
        """Of record-level privacy, the largest of any organization's; None without it."""
        return max_figures({o.name: o.figures for o in self.organizations if o.figures is not None})

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; of the plan, what identifies it."""
        plan = self.plan
        about = {"plan": plan.name, "plan_id": plan.plan_id, "labels": plan.labels, "rounds": plan.rounds}
        base = {"base": plan.model.base, "base_hash": plan.model.base_hash, "config_hash": plan.model.config_hash}
        privacy = plan.privacy if plan.privacy == "none" else plan.privacy.model_dump(mode="json")
        values = {key: value for key, value in asdict(self).items() if key != "plan"}
        timed = values.pop("time") or {"seconds": None, "timed_records": None}
        times = {"seconds": timed["seconds"], "timed_records": timed["timed_records"]}
        return {"schema": 1, **about, **base, "privacy": privacy, **values, **times}


def forecast(plan: Plan, device: str = "auto", began: float | None = None) -> Forecast:
    """Read data and model and time a few batches; nothing is trained.

    Args:
        plan: The plan.
        device: auto, cpu, cuda or cuda:N.
        began: When the command began, by `time.perf_counter`: what it needs to get here a simulation needs, too.

    Raises:
        CotuneError: What `prepare` raises.
    """
    start = time.perf_counter() if began is None else began
    prepared = prepare(plan, device)
    model = get_plan_model(prepared.plan, device)
    spent = time.perf_counter() - start
    return _forecast(get_members(prepared, model), estimate(prepared, model, spent))


def forecast_for(plan: Plan, examples: Sequence[int], device: str = "auto") -> Forecast:
    """Forecast a plan for organizations with given numbers of records: no data are read. Raises what `build_members` raises.

    Args:
        plan: What they carry out.
        examples: The number of records of each organization.
        device: auto, cpu, cuda or cuda:N.
    """
    return _forecast(build_members(plan, examples, device), None)


def _forecast(expected: Expected, time: Estimate | None) -> Forecast:
    stages = tuple(_stages(expected))
    return Forecast(
        expected.plan,
        expected.test_examples,
        tuple(_organization(expected.plan, member) for member in expected.members),
        stages,
        time,
        new_policy(expected.plan, expected.members),
        _client_privacy(expected, max(stage.parameters for stage in stages)),
        expected.notes,
    )


def _client_privacy(expected: Expected, parameters: int) -> ClientForecast | None:
    plan = expected.plan
    privacy = expected.plan.client_privacy
    if privacy is None:
        return None
    noise = compute_round_noise(plan, len(expected.members))
    planned = [replace(noise.charge, count=plan.rounds)]
    return ClientForecast(
        epsilon(planned, privacy.delta),
        noise.charge.noise_multiplier,
        noise.expected,
        noise.updates * privacy.clip_norm * math.sqrt(parameters) / noise.expected,
        privacy.clip_norm,
        tuple(client_statement(privacy, noise, planned, sample_rate=plan.server.sample_rate)),
    )


def _organization(plan: Plan, member: Member) -> OrganizationForecast:
    planned = planned_steps(plan, member.public)
    steps = sum(count for _, count in planned)
    batch = planned[-1][0] * member.public
    if not isinstance(plan.privacy, RecordPrivacy) or member.noise_multiplier is None:
        return OrganizationForecast(member.name, member.examples, batch, steps, None, None, None, None)
    sigma = member.noise_multiplier
    delta = plan.privacy.delta_for(member.public)
    figures = compute_figures(planned_charges(plan, member.policy, sigma, member.public), delta)
    allowed = member.policy.budget.epsilon_for(plan.privacy.epsilon)
    return OrganizationForecast(member.name, member.examples, batch, steps, sigma, allowed, figures.epsilon, delta, figures)


def _requests(
    plan: Plan, state: State, changed: Sequence[str], recipients: Sequence[Recipient], beside: Mapping[str, Tensor]
) -> list[RecordDict]:
    """The requests of a round before which all parameters that travel have changed."""
    zeros = {name: torch.zeros_like(state[name]) for name in changed}
    change = RoundChange(1, state_digest(state), frozenset(state), zeros)
    known = [] if plan.wire_down == "float32" else [change]
    held = {who.organization: change.round for who in recipients}
    return list(RoundRequests(plan, change.round + 1, state, beside, changes=known).encode(recipients, held).values())


def _stages(expected: Expected) -> Iterator[StageForecast]:
    """Sizes are those of real messages: requests with the model's present values, updates with zeros."""
    plan = expected.plan
    model = expected.model
    names = [member.name for member in expected.members]
    held = dict[str, Tensor]()
    first = 1
    for stage in plan.stages:
        held, traveling = begin_round(model, plan, held, first)
        shared = {name: held[name] for name in traveling}
        first = first + stage.rounds
        term = plan.strategy.client_term
        beside = shared if term is not None and term.info("client_term").needs.receives else {}
        requests = _requests(plan, held, traveling, [Recipient(name) for name in names], beside)
        arrays = {name: torch.zeros(shape) for name, shape in statistic_shapes(plan, model, shared).items()}
        empty = {name: torch.zeros(tensor.shape) for name, tensor in shared.items()}
        filled = Update(names[0], 1, empty, 1, 1, statistics=arrays, received="0" * 64)
        update = encode_update(filled, plan.plan_id, codec=plan.wire)
        yield StageForecast(
            stage.mode,
            stage.rounds,
            max(stage.local.steps_per_round(member.public) for member in expected.members),
            sum(tensor.numel() for tensor in shared.values()),
            payload_bytes(update) * len(names),
            sum(payload_bytes(request) for request in requests),
        )
