"""What a plan will do, before it does it: who holds how much, how much noise, how many bytes, about how long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cotune.client.budget import planned_steps, planned_telling
from cotune.models.features import encode_batch, feature_head
from cotune.models.holdings import Holdings
from cotune.models.sharing import SharedModel
from cotune.models.tasks import Example, example_losses
from cotune.plan.model import model_of
from cotune.plan.schema import Plan, Stage
from cotune.plan.statistics import statistic_shapes
from cotune.privacy.accounting import RecordPrivacy, Steps, epsilon
from cotune.privacy.claim import Figures, figures_of, worst
from cotune.privacy.statement import client_statement
from cotune.server.client_level import client_level_noise
from cotune.server.step import enter_round
from cotune.simulations.sites import Prepared, prepare
from cotune.strategies.updates import Update
from cotune.strategies.wire import Recipient, encode_requests, encode_update, payload_bytes

__all__ = ["ClientForecast", "Forecast", "OrganisationForecast", "StageForecast", "forecast"]

_SAMPLE = 32  # records that are timed
_CLIPPING_COST = {"head": 1.1, "lora": 1.1, "full": 1.7}  # of DP-SGD by Opacus against plain training


@dataclass(frozen=True)
class OrganisationForecast:
    """Per organisation; the privacy figures are None without privacy. batch: expected records per step."""

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
    """Per stage. bytes_up and bytes_down: of one round, all organisations together. parameters: that are trained and travel.
    steps: in one round, of the organisation that takes most.
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
    expected_organisations: float
    noise: float
    signal: float
    statement: tuple[str, ...]


@dataclass(frozen=True)
class Forecast:
    """The whole plan. seconds: a rough estimate from a timed sample on this machine."""

    plan: Plan
    test_examples: int
    organisations: tuple[OrganisationForecast, ...]
    stages: tuple[StageForecast, ...]
    seconds: float
    client_privacy: ClientForecast | None = None
    notes: tuple[str, ...] = ()  # about the records

    @property
    def figures(self) -> Figures | None:
        """Of record-level privacy, the largest of any organization's; None without it."""
        return worst({o.name: o.figures for o in self.organisations if o.figures is not None})


def forecast(plan: Plan, device: str = "auto") -> Forecast:
    """Reads data and model and times a few records; trains nothing. Raises what `prepare` raises."""
    prepared = prepare(plan, device)
    resolved = prepared.plan
    model = model_of(resolved, device)
    stages = tuple(_stages(prepared, model))
    return Forecast(
        resolved,
        sum(len(rows) for _, rows in prepared.test),
        _organisations(prepared),
        stages,
        _seconds(prepared, model),
        _client_privacy(prepared, max(stage.parameters for stage in stages)),
        tuple(prepared.notes),
    )


def _client_privacy(prepared: Prepared, parameters: int) -> ClientForecast | None:
    plan, privacy = prepared.plan, prepared.plan.client_privacy
    if privacy is None:
        return None
    noise = client_level_noise(plan, len(prepared.shares))
    planned = [replace(noise.charge, count=plan.rounds)]
    return ClientForecast(
        epsilon(planned, privacy.delta),
        noise.charge.noise_multiplier,
        noise.expected,
        noise.updates * privacy.clip_norm * math.sqrt(parameters) / noise.expected,
        privacy.clip_norm,
        tuple(client_statement(privacy, noise, planned, sample_rate=plan.server.sample_rate)),
    )


def _organisations(prepared: Prepared) -> tuple[OrganisationForecast, ...]:
    plan, found = prepared.plan, []
    for share in prepared.shares:
        held, n = share.units, share.public_examples(plan)
        planned = planned_steps(plan, n)
        steps, batch = sum(count for _, count in planned), planned[-1][0] * n
        if isinstance(plan.privacy, RecordPrivacy):
            sigma, delta = prepared.noise[share.name], plan.privacy.delta_for(n)
            telling = planned_telling(plan, share.policy(plan))
            figures = figures_of([*telling, *(Steps(sigma, rate, count) for rate, count in planned)], delta)
            allowed = min(plan.privacy.epsilon, share.epsilon or plan.privacy.epsilon)
            found.append(OrganisationForecast(share.name, held, batch, steps, sigma, allowed, figures.epsilon, delta, figures))
        else:
            found.append(OrganisationForecast(share.name, held, batch, steps, None, None, None, None))
    return tuple(found)


def _stages(prepared: Prepared, model: SharedModel) -> Iterator[StageForecast]:
    """Sizes are those of real messages with the model's present values in them."""
    plan, names, held, first = prepared.plan, [s.name for s in prepared.shares], dict[str, Tensor](), 1
    for stage in plan.stages:
        held, travelling = enter_round(model, plan, held, first)
        shared, first = {name: held[name] for name in travelling}, first + stage.rounds
        term = plan.strategy.client_term
        beside = shared if term is not None and term.info("client_term").needs.receives else {}
        requests = encode_requests(plan.canonical(), 1, held, [Recipient(name) for name in names], beside)
        arrays = {name: torch.zeros(shape) for name, shape in statistic_shapes(plan, model, shared).items()}
        update = encode_update(Update(names[0], 1, shared, 1, 1, statistics=arrays, received="0" * 64), plan.plan_id)
        yield StageForecast(
            stage.mode,
            stage.rounds,
            max(stage.local.steps_of(share.public_examples(plan)) for share in prepared.shares),
            sum(tensor.numel() for tensor in shared.values()),
            payload_bytes(update) * len(names),
            sum(payload_bytes(request) for request in requests),
        )


def _seconds(prepared: Prepared, model: SharedModel) -> float:
    """Encoding once where the encoder is frozen, training every step's records else, and the baselines the same again."""
    plan = prepared.plan
    examples = _examples(prepared, model)
    records = sum(len(r) for r in prepared.records.values())
    total = 0.0
    for stage in plan.stages:
        if stage.mode == "head" and feature_head(model) is not None:
            total += records * _time_per_record(plan, model, examples, None)
        else:
            sizes = [s.public_examples(plan) for s in prepared.shares]
            work = stage.rounds * sum(stage.local.sample_rate(n) * n * stage.local.steps_of(n) for n in sizes)
            cost = _CLIPPING_COST[stage.mode] if plan.privacy != "none" else 1.0
            total += (1 + len(plan.simulation.baselines)) * work * cost * _time_per_record(plan, model, examples, stage)
    return total


def _examples(prepared: Prepared, model: SharedModel) -> list[Example]:
    """A few records from all organisations."""
    parts = tuple((prepared.records[s.file], s.rows[:_SAMPLE]) for s in prepared.shares)
    sample = Holdings(parts, prepared.plan.labels, prepared.plan.task).examples(model)
    return sample[:: max(1, len(sample) // _SAMPLE)][:_SAMPLE]


def _time_per_record(plan: Plan, model: SharedModel, examples: list[Example], stage: Stage | None) -> float:
    """Seconds for one record: encoded only without a stage, forward and backward with one. The first pass only warms up."""
    if stage is None:
        return min(_timed(lambda: encode_batch(model, examples, plan.model.precision)) for _ in range(3)) / len(examples)
    batch = model.loaded.task.collator(model.module, model.loaded.reader, model.device)(examples)
    model.train_only(model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings))

    def step() -> None:
        example_losses(model.module, batch).mean().backward()  # type: ignore[no-untyped-call]
        model.module.zero_grad(set_to_none=True)

    return min(_timed(step) for _ in range(3)) / len(examples)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
