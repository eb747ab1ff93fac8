"""One round at an organization: from the state of the shared model to an update, charged to its ledger before it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cotune.client.account import Account
from cotune.client.site import Site
from cotune.client.training.context import (
    BEFORE_CHARGE,
    BEFORE_RECORDS,
    BEFORE_TRAINING,
    BY_PUBLIC_NUMBER,
    LocalContext,
    run_checks,
)
from cotune.client.training.disclosures import Disclosures, reported_noise, statistics_of
from cotune.client.training.extensions import ClientTermState, RankMask
from cotune.client.training.observe import notify
from cotune.client.training.own_copy import OwnCopy, open_personal
from cotune.client.training.personal import PersonalParameters
from cotune.client.training.rows import TrainingSetup
from cotune.client.training.setup import SanityChecks, build_optimizer, build_setup, check_gradients
from cotune.errors import Declined, RunError
from cotune.models.device import explained_out_of_memory
from cotune.models.trainable import State
from cotune.plan.parameters import trained_names
from cotune.plan.schema import Plan
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup, StepReport
from cotune.privacy.mechanisms.random import PoissonSampler, seeded_generator
from cotune.protocol.codecs import round_to, rounding_generator
from cotune.strategies.types import Delta, Update, difference, find_not_finite


def train_round(
    plan: Plan,
    site: Site,
    round: int,
    state: State,
    *,
    admitted: int = 0,
    sent: Mapping[str, Tensor] | None = None,
    declarable: tuple[int, int] | None = None,
) -> Update:
    """Train one round from `state` and return the update; the same request again gets the same update, without training.

    The order is a promise: nothing reads a record before the plan is approved and allowed, what the server can see depends on the
    public number of records alone, and no record takes part in training or in what is disclosed before it is charged (see
    `client.training.context`).

    Args:
        plan: As it came, verified.
        site: Of the organization.
        round: Which one, from 1.
        state: The shared parameters.
        admitted: The last round whose update of this organization is in the model; 0: none.
        sent: What the server sends beside the state.
        declarable: Between which numbers of records the public one has to be; None: whatever the plan takes.

    Raises:
        Declined: The policy does not allow the plan, or not any more.
        DataError: The organization's records cannot be used.
        PrivacyError: The budget does not suffice, or the model cannot be trained privately.
        RunError: The request is not one that the plan makes, or training failed.
        DeviceError: The GPU is full; what was charged for the round stays charged.
    """
    context = LocalContext(plan, site, site.policy(), round, state, admitted, sent or {}, declarable)
    run_checks(BEFORE_RECORDS, context)
    run_checks(BY_PUBLIC_NUMBER, context)
    finished = site.finished_update(plan.plan_id, round, context.received)
    if finished is not None:
        return finished
    run_checks(BEFORE_TRAINING, context)
    with explained_out_of_memory("ask for a smaller local.physical_batch_size in the plan, or free the GPU"):
        prepared = _prepare(context)
        trained = _train_with_privacy(prepared) if isinstance(plan.privacy, RecordPrivacy) else _train_without_privacy(prepared)
    update = _build_update(prepared, trained)
    _keep(prepared, update)
    return update


@dataclass(frozen=True)
class _Prepared:
    """A round that is ready to be trained: the model holds what was received, and only the stage's parameters are trained."""

    context: LocalContext
    setup: TrainingSetup
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]  # those that are trained
    received: State  # what they start from
    sanity_checks: SanityChecks
    personal: PersonalParameters
    correction: ClientTermState
    own_rank: RankMask

    def attach_extensions(self) -> ExitStack:
        """During the block the client term and the smaller rank take part in every step."""
        with ExitStack() as stack:
            stack.enter_context(self.correction.attach(self.optimizer, self.parameters))
            stack.enter_context(self.own_rank.attach(self.optimizer, self.parameters))
            return stack.pop_all()


@dataclass(frozen=True)
class _Trained:
    """What training gives beside the parameters."""

    steps: int
    disclosed: dict[str, float]
    epsilon: float | None = None
    noise: dict[str, float] | None = None


def _prepare(context: LocalContext) -> _Prepared:
    """Set the model to what was received. Records are encoded, by the frozen part of the model; nothing of it leaves."""
    plan = context.plan
    site = context.site
    model = context.model
    model.load(context.state)
    personal = open_personal(plan, site, model, context.round, context.admitted)
    correction = ClientTermState(plan, site, context.admitted, context.sent)
    own_rank = RankMask(plan, context.stage, context.policy, model)
    received = own_rank.mask_state(model, personal.join(context.state))
    names = trained_names(plan, model, context.round)
    parameters = model.train_only(names)
    setup = build_setup(
        plan,
        context.stage,
        model,
        context.account.holdings,
        context.state,
        site.organization,
        expected_batch=context.expected_batch,
    )
    return _Prepared(
        context,
        setup,
        build_optimizer(context.stage.local, model, names, parameters),
        dict(zip(names, parameters, strict=True)),
        received,
        _sanity_checks(context, {name: received[name] for name in names}, noise=context.account.budget is not None),
        personal,
        correction,
        own_rank,
    )


def _sanity_checks(context: LocalContext, before: State, *, noise: bool) -> SanityChecks:
    """Thorough in every round of a real organization, and in the last one of a simulated one: there is one model for all."""
    thorough = not context.site.file.simulated or context.round == context.plan.rounds
    return SanityChecks(context.model, before, noise=noise, thorough=thorough)


def _train_with_privacy(prepared: _Prepared) -> _Trained:
    """Check the budget, then disclose and train; each is charged before a record takes part in it."""
    context = prepared.context
    run_checks(BEFORE_CHARGE, context)
    disclosed = _disclose(prepared)
    shared = {name: prepared.parameters[name] for name in prepared.personal.shared}
    noise = reported_noise(context.account, context.noise_multiplier, context.stage, prepared.optimizer, shared)
    steps = _private_training(prepared)
    return _Trained(steps, disclosed, context.account.reported_epsilon(), noise)


def _train_without_privacy(prepared: _Prepared) -> _Trained:
    """Enter that the update leaves without privacy, then disclose and train."""
    context = prepared.context
    context.account.record_unprotected(context.round, "training")
    disclosed = _disclose(prepared)
    with prepared.attach_extensions():
        reports = _plain_steps(prepared.setup, prepared.optimizer, _sampler(prepared))
        steps = _follow(reports, prepared, prepared.sanity_checks, None)
    _train_copy(
        prepared, lambda optimizer: _plain_steps(prepared.setup, optimizer, _sampler(prepared, "own batches")), noise=False
    )
    return _Trained(steps, disclosed)


def _private_training(prepared: _Prepared) -> int:
    """Train by DP-SGD and return the steps of the shared model. The ledger is charged before a record enters a batch."""
    context = prepared.context
    plan = context.plan
    account = context.account
    privacy = plan.privacy
    assert isinstance(privacy, RecordPrivacy)
    check_gradients(prepared.setup, privacy, context.stage.mode)
    rate = context.stage.local.sample_rate(context.examples)
    charged = Steps(context.noise_multiplier, rate, plan.charged_steps(context.stage, context.examples))
    charge = account.reserve(context.round, charged)
    began = time.monotonic()
    epsilon = account.epsilon()
    config = DPSGDConfig(
        noise_multiplier=charged.noise_multiplier,
        clip_norm=privacy.clip_norm,
        sample_rate=charged.sample_rate,
        expected_batch=context.expected_batch,
        steps=context.stage.local.steps_per_round(context.examples),
        clipping_mode=privacy.clipping,
    )
    rows = prepared.setup

    def private_steps(optimizer: torch.optim.Optimizer) -> Iterator[StepReport]:
        setup = DPSGDSetup(rows.module, optimizer, rows.loss, rows.units, rows.batches)
        return _within_hours(DPSGD(config).run(setup), account)

    def plain_steps(optimizer: torch.optim.Optimizer) -> Iterator[StepReport]:
        return _within_hours(_plain_steps(rows, optimizer, _sampler(prepared, "own batches")), account)

    with prepared.attach_extensions():
        taken = _follow(private_steps(prepared.optimizer), prepared, prepared.sanity_checks, epsilon)
    noise = plan.personal.noise
    copied = _train_copy(prepared, private_steps if noise else plain_steps, noise=noise)
    account.ledger.settle(charge, taken + (copied if noise else 0), time.monotonic() - began)
    return taken


def _train_copy(prepared: _Prepared, steps: Callable[[torch.optim.Optimizer], Iterator[StepReport]], *, noise: bool) -> int:
    """Train the organization's own copy, after the shared model, which is left as it is; return the steps, 0 without a copy.

    Args:
        steps: An optimizer -> the steps that it takes.
        noise: Whether they add noise.
    """
    copy = prepared.personal
    if not isinstance(copy, OwnCopy):
        return 0
    context = prepared.context
    with copy.in_place(prepared.received) as parameters:
        names = list(parameters)
        optimizer = build_optimizer(context.stage.local, context.model, names, list(parameters.values()))
        checks = _sanity_checks(context, context.model.state(names), noise=True) if noise else None
        with copy.pull(optimizer, parameters, prepared.received):
            return _follow(steps(optimizer), prepared, checks, None)


def _within_hours(reports: Iterator[StepReport], account: Account) -> Iterator[StepReport]:
    """Pass reports on until the policy's hours are over: then Declined is raised, and the round counts as reserved."""
    began = time.monotonic()
    before = account.hours()
    allowed = account.policy.training.max_hours
    for report in reports:
        yield report
        hours = before + (time.monotonic() - began) / 3600
        if hours >= allowed and report.step < report.steps:
            raise Declined("training.max_hours", f"the plan has trained for {hours:.1f} hours, expected at most {allowed:g}")


def _disclose(prepared: _Prepared) -> dict[str, float]:
    """Compute what else the organization tells, about its records and the received model."""
    account = prepared.context.account
    round = prepared.context.round
    setup = prepared.setup
    disclosures = Disclosures(account)
    return {
        **disclosures.histogram(lambda: list(account.holdings.label_counts().values())),
        **disclosures.metrics(lambda: _correct(setup), round),
        **disclosures.loss(lambda ceiling: _total_loss(setup, ceiling), account.true_examples, round),
    }


@torch.no_grad()
def _correct(setup: TrainingSetup) -> tuple[float, int]:
    """How many units the module classifies rightly, of how many; of a unit, the fraction of its records."""
    right = (float(setup.correct(batch)[: len(weights)].double().cpu() @ weights) for weights, batch in setup.everything())
    return sum(right), len(setup.units)


@torch.no_grad()
def _total_loss(setup: TrainingSetup, ceiling: float) -> float:
    """Σ min(ℓ_i, ceiling), of a unit the mean over its records, so that it changes the sum by the ceiling at most.

    A record whose loss is not a number counts for the ceiling, as a failure would tell of it.
    """
    losses = ((setup.loss(batch)[: len(weights)].double().cpu(), weights) for weights, batch in setup.everything())
    known = ((loss.nan_to_num(nan=ceiling, posinf=ceiling).clamp(0.0, ceiling), weights) for loss, weights in losses)
    return sum(float(loss @ weights) for loss, weights in known)


def _sampler(prepared: _Prepared, purpose: str = "batches") -> PoissonSampler:
    """Poisson samples of the rows, reproducible from the plan's seed: training without privacy."""
    context = prepared.context
    local = context.stage.local
    generator = seeded_generator(context.plan.seed, purpose, context.site.organization, context.round)
    return PoissonSampler(
        prepared.setup.rows, local.sample_rate(context.examples), local.steps_per_round(context.examples), generator
    )


def _plain_steps(setup: TrainingSetup, optimizer: torch.optim.Optimizer, sampler: PoissonSampler) -> Iterator[StepReport]:
    """Steps without clipping and noise; an empty batch takes none."""
    for step, batch in enumerate(sampler, start=1):
        optimizer.zero_grad()
        total = 0.0
        for _, rows in setup.batches(batch):
            loss = setup.loss(rows).sum() / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if batch:
            optimizer.step()
        yield StepReport(step, len(sampler), total if batch else None)


def _follow(reports: Iterator[StepReport], prepared: _Prepared, checks: SanityChecks | None, epsilon: float | None) -> int:
    """Take the steps, check the first, tell local observers of each, and return how many were taken.

    Args:
        checks: None where even a failure would tell of records that no noise protects.
        epsilon: ε with this round, which is reserved already.
    """
    taken = 0
    for report in reports:
        if checks is not None:
            checks.after_step(report)
        taken = report.step
        notify(
            "step",
            organization=prepared.context.site.organization,
            round=prepared.context.round,
            step=report.step,
            steps=report.steps,
            loss=report.loss,
            epsilon=epsilon,
        )
    if checks is not None:
        checks.after_round()
    return taken


def _build_update(prepared: _Prepared, trained: _Trained) -> Update:
    context = prepared.context
    model = context.model
    shared = prepared.personal.shared
    delta = prepared.own_rank.trim(difference(model.state(shared), prepared.received))
    _check_finite(delta)
    delta = _round_delta(context, delta)
    return Update(
        context.site.organization,
        context.round,
        delta,
        context.examples,
        trained.steps,
        trained.epsilon,
        trained.disclosed,
        trained.noise,
        statistics_of(context.plan, model, shared, prepared.setup),
        context.received,
    )


def _round_delta(context: LocalContext, delta: Delta) -> Delta:
    """The values that travel, from here on the only ones: what is kept, checked, logged and sent. Noise was added before.

    Repeatable, as a request that comes again is answered with the same update. Raises RunError for a value that the codec cannot
    write.
    """
    plan = context.plan
    organization = context.site.organization
    return {
        name: round_to(plan.wire, tensor, rounding_generator(plan.seed, organization, context.round, name))
        for name, tensor in delta.items()
    }


def _check_finite(delta: Delta) -> None:
    """A diverged model is not sent."""
    if find_not_finite(delta):
        raise RunError(
            "the local model is not finite any more: expected finite parameters; lower local.learning_rate",
            code="run.diverged",
        )


def _keep(prepared: _Prepared, update: Update) -> None:
    """Keep what the next round goes on from and, last, the update: from then on the round is answered."""
    context = prepared.context
    prepared.correction.keep(context.round, context.stage, update.delta)
    prepared.personal.keep()
    context.site.keep(update, context.plan.plan_id)
    if context.account.budget is not None:
        context.account.answered(context.round)
