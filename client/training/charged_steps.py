"""The steps of a round: with privacy, charged before a record takes part, or without; the own part's before or after."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch

from cotune.client.local_events import notify
from cotune.client.run_account import Account
from cotune.client.training.checks.gradient_checks import check_gradients, check_gradients_of_state
from cotune.client.training.checks.request_checks import BEFORE_CHARGE, run_checks
from cotune.client.training.checks.sanity_checks import SanityChecks, build_sanity_checks, trials_allowed
from cotune.client.training.disclosures import disclose, reported_noise
from cotune.client.training.personal.ditto_pfedme import OwnCopy
from cotune.client.training.preparation import PreparedRound
from cotune.client.training.stage_setup.optimizer import build_optimizer
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.errors import DeviceError, PolicyError
from cotune.models.trainable import TrainableModel
from cotune.plan.local_training import Stage
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup, StepReport, Sums
from cotune.privacy.mechanisms.random_generators import PoissonSampler, seeded_generator
from cotune.protocol.messages import state_digest

Take = Callable[[torch.optim.Optimizer, int, str], Iterator[StepReport]]  # (optimizer, steps, what samples are for) -> them
BATCHES = "batches"  # samples of what is shared
OWN_BATCHES = "own batches"  # of what is personal alone


@dataclass(frozen=True)
class TrainedRound:
    """What training gives beside the parameters."""

    steps: int
    disclosed: dict[str, float]
    epsilon: float | None = None
    noise: dict[str, float] | None = None


def train_with_privacy(prepared: PreparedRound) -> TrainedRound:
    """Check the budget, then disclose and train by DP-SGD; each is charged before a record takes part in it.

    Raises:
        PrivacyError: The budget does not suffice, or the gradients are wrong.
        PolicyError: The policy's hours are over.
    """
    context = prepared.context
    run_checks(BEFORE_CHARGE, context)
    disclosed = disclose(context.account, context.round, prepared.setup)
    shared = {name: prepared.parameters[name] for name in prepared.personal.shared if name in prepared.parameters}
    noise = reported_noise(context.account, context.noise_multiplier, context.stage, prepared.optimizer, shared)
    steps = _private_training(prepared)
    return TrainedRound(steps, disclosed, context.account.reported_epsilon(), noise)


def train_without_privacy(prepared: PreparedRound) -> TrainedRound:
    """Record in the ledger that the update leaves without privacy, then disclose and train."""
    context = prepared.context
    context.account.record_unprotected(context.round, "training")
    disclosed = disclose(context.account, context.round, prepared.setup)

    def plain_steps(optimizer: torch.optim.Optimizer, steps: int, purpose: str) -> Iterator[StepReport]:
        return _plain_steps(prepared.setup, optimizer, _sampler(prepared, steps, purpose))

    _train_own_first(prepared, plain_steps)
    taken = _train_shared(prepared, plain_steps, None)
    _train_copy(prepared, plain_steps, noise=False)
    return TrainedRound(taken, disclosed)


def _private_training(prepared: PreparedRound) -> int:
    """Train by DP-SGD and return the steps of the shared model. The ledger is charged before a record enters a batch."""
    context = prepared.context
    plan = context.plan
    account = context.account
    privacy = plan.privacy
    assert isinstance(privacy, RecordPrivacy)
    trained_from = _decides_gradients(prepared)
    checked = partial(check_gradients_of_state, prepared.setup, privacy, context.stage.mode, context.model, trained_from)
    prepared.setup.physical.fit(checked)
    rate = context.stage.local.sample_rate(context.examples)
    charged = Steps(context.noise_multiplier, rate, plan.charged_steps(context.stage, context.examples))
    charge = account.reserve(context.round, charged)
    began = time.monotonic()
    epsilon = account.epsilon()
    config = mechanism_of(charged, privacy, context.expected_batch)
    rows = prepared.setup
    fit = _FittedSums(prepared.setup, privacy, context.stage, context.model)

    def private_steps(optimizer: torch.optim.Optimizer, steps: int, purpose: str) -> Iterator[StepReport]:
        setup = DPSGDSetup(rows.module, optimizer, rows.loss, rows.units, rows.batches, fit=fit)
        return within_hours(DPSGD(replace(config, steps=steps)).run(setup), account)

    def plain_steps(optimizer: torch.optim.Optimizer, steps: int, purpose: str) -> Iterator[StepReport]:
        return within_hours(_plain_steps(rows, optimizer, _sampler(prepared, steps, purpose)), account)

    noise = plan.personal.noise
    first = _train_own_first(prepared, private_steps)
    taken = _train_shared(prepared, private_steps, epsilon)
    copied = _train_copy(prepared, private_steps if noise else plain_steps, noise=noise)
    account.settle(charge, charged, first + taken + (copied if noise else 0), time.monotonic() - began)
    return taken


def mechanism_of(charged: Steps, privacy: RecordPrivacy, expected_batch: float) -> DPSGDConfig:
    """Return the mechanism of steps as they were charged.

    Args:
        charged: The steps, reserved in the ledger.
        privacy: Clip norm and clipping mode.
        expected_batch: The public number that sums are divided by.
    """
    return DPSGDConfig(
        noise_multiplier=charged.noise_multiplier,
        clip_norm=privacy.clip_norm,
        sample_rate=charged.sample_rate,
        expected_batch=expected_batch,
        steps=charged.count,
        clipping_mode=privacy.clipping,
    )


def _decides_gradients(prepared: PreparedRound) -> object:
    """What decides, beside the shapes of batches, whether gradients are right: once for all of it, they are checked.

    The values of a state are whatever a server sends, so that an organization checks each. Those of a simulation come from its
    own plan; how gradients are taken follows from plan, stage and what is trained there, which may change from round to round.
    """
    context = prepared.context
    if context.site.file.simulated:
        ends = accumulate(stage.rounds for stage in context.plan.stages)
        return context.plan.plan_id, next(end for end in ends if context.round <= end), tuple(prepared.parameters)
    return context.plan.plan_id, context.round, state_digest(prepared.received)


class _FittedSums:
    """Sums of a step under privacy, begun again where memory ran out; batches of another shape are checked before they train.

    Args:
        setup: What is trained on.
        privacy: Of the plan.
        stage: What is trained.
        model: The model.
    """

    def __init__(self, setup: TrainingSetup, privacy: RecordPrivacy, stage: Stage, model: TrainableModel) -> None:
        self._setup = setup
        self._stage = stage
        self._model = model
        self._privacy = privacy
        self._checked = setup.physical.rows

    def __call__(self, work: Callable[[], Sums]) -> Sums:
        return self._setup.physical.fit(partial(self._checked_sums, work))

    def _checked_sums(self, work: Callable[[], Sums]) -> Sums:
        if self._setup.physical.rows != self._checked:
            self._check()
            self._checked = self._setup.physical.rows
        return work()

    def _check(self) -> None:
        """On made-up records. Raises PrivacyError, and DeviceError where dropout would let two passes differ."""
        if self._stage.local.dropout:
            raise DeviceError(
                "memory ran out in the middle of a round with local.dropout, whose batches cannot be checked in another size now:"
                " ask again, or set a smaller local.physical_batch_size in the plan",
                code="device.out_of_memory_with_dropout",
            )
        with trials_allowed(self._model):
            check_gradients(self._setup, self._privacy, self._stage.mode)


def _train_own_first(prepared: PreparedRound, take: Take) -> int:
    """Train what is personal alone, before what is shared, where the plan has that order; return the steps, 0 without it."""
    names = prepared.personal.own_first(list(prepared.parameters))
    if not names:
        return 0
    context = prepared.context
    own = prepared.narrow(names)
    steps = context.plan.personal.count_own_steps(context.stage.local.steps_per_round(context.examples))
    with own.attach_extensions():
        return _follow(take(own.optimizer, steps, OWN_BATCHES), own, own.sanity_checks, None)


def _train_shared(prepared: PreparedRound, take: Take, epsilon: float | None) -> int:
    """Train what is shared, and what is personal with it unless it was trained before; return the steps."""
    first = set(prepared.personal.own_first(list(prepared.parameters)))
    rest = prepared.narrow([name for name in prepared.parameters if name not in first]) if first else prepared
    steps = rest.context.stage.local.steps_per_round(rest.context.examples)
    with rest.attach_extensions():
        return _follow(take(rest.optimizer, steps, BATCHES), rest, rest.sanity_checks, epsilon)


def _train_copy(prepared: PreparedRound, take: Take, *, noise: bool) -> int:
    """Train the organization's own copy, after the shared model, which is left as it is; return the steps, 0 without such a copy.

    Args:
        prepared: The round.
        take: How steps are taken.
        noise: Whether they add noise.
    """
    copy = prepared.personal
    context = prepared.context
    steps = context.plan.personal.count_own_steps(context.stage.local.steps_per_round(context.examples))
    if not isinstance(copy, OwnCopy) or not steps:
        return 0
    with copy.in_place(prepared.received) as parameters:
        names = list(parameters)
        optimizer = build_optimizer(context.stage.local, context.model, names, list(parameters.values()))
        checks = build_sanity_checks(context, context.model.state(names), noise=True) if noise else None
        regularized = prepared.regularization.attach(optimizer, parameters)
        with regularized, copy.pull(optimizer, parameters, prepared.received):
            return _follow(take(optimizer, steps, OWN_BATCHES), prepared, checks, None)


def within_hours(reports: Iterator[StepReport], account: Account) -> Iterator[StepReport]:
    """Pass reports on until the policy's hours are over: then PolicyError is raised, and the round counts as reserved."""
    began = time.monotonic()
    before = account.hours()
    allowed = account.policy.training.max_hours
    with _closing(reports):
        for report in reports:
            yield report
            hours = before + (time.monotonic() - began) / 3600
            if hours >= allowed and report.step < report.steps:
                reason = f"the plan has trained for {hours:.1f} hours, expected at most {allowed:g}"
                raise PolicyError("training.max_hours", reason)


@contextmanager
def _closing(reports: Iterator[StepReport]) -> Iterator[None]:
    """However the block ends, steps that are not taken to their end leave no hooks in the model, which trains again.

    Without it they would stay for as long as a traceback refers to them.
    """
    try:
        yield
    finally:
        if isinstance(reports, Generator):
            reports.close()


def _sampler(prepared: PreparedRound, steps: int, purpose: str) -> PoissonSampler:
    """Poisson samples of the rows, reproducible from the plan's seed: training without privacy."""
    context = prepared.context
    local = context.stage.local
    generator = seeded_generator(context.plan.seed, purpose, context.site.organization, context.round)
    return PoissonSampler(prepared.setup.rows, local.sample_rate(context.examples), steps, generator)


def _plain_steps(setup: TrainingSetup, optimizer: torch.optim.Optimizer, sampler: PoissonSampler) -> Iterator[StepReport]:
    """Steps without clipping and noise; an empty batch takes none."""
    for step, batch in enumerate(sampler, start=1):
        loss = setup.set_mean_gradients(optimizer, batch)
        if batch:
            optimizer.step()
        yield StepReport(step, len(sampler), loss if batch else None)


def _follow(reports: Iterator[StepReport], prepared: PreparedRound, checks: SanityChecks | None, epsilon: float | None) -> int:
    """Take the steps, check the first, tell local observers of each, and return how many were taken.

    Args:
        checks: None where even a failure would reveal something about records that no noise protects.
        epsilon: ε with this round, which is reserved already.
    """
    taken = 0
    if checks is not None:
        checks.begin()
    with _closing(reports):
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
