"""One round at an organization: from the state of the shared model to an update, charged to its ledger before it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cotune.client.account import Account
from cotune.client.budget import check_examples
from cotune.client.policy_check import Approvals, check_consent, check_number, check_plan, limit_gpu_memory
from cotune.client.site import Site
from cotune.client.site_setup import model_here
from cotune.client.training.disclosures import Disclosures, stated_noise, statistics_of
from cotune.client.training.extensions import Correction, Personal, RankMask
from cotune.client.training.observe import tell
from cotune.client.training.rows import TrainingSetup
from cotune.client.training.setup import Guard, check_gradients, optimizer_of, setting_of
from cotune.errors import Declined, RunError
from cotune.models.trainable import State
from cotune.plan.local_training import Stage
from cotune.plan.parameters import trained_names
from cotune.plan.schema import Plan
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import StepReport, private_steps
from cotune.privacy.mechanisms.random import PoissonSampler, seeded_generator
from cotune.protocol.messages import received_digest
from cotune.strategies.types import Update, difference, not_finite

_MOST_VALUE = 1e4  # of a parameter; those of usable models are below 100, and extreme ones are how rounding errors are made large


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
    """Trains one round from `state` and returns the update; the same request again gets the same update, without training.

    admitted, sent: as in the request (see protocol/messages). declarable: see `policy_check.check_number`.
    Raises DataError when the organization's records cannot be used, PrivacyError when its budget does not suffice.
    """
    stage = plan.stage_of(round)
    sent = sent or {}
    if not 0 <= admitted < round:
        raise RunError(f"the request for round {round} names round {admitted} as the last admitted one: expected an earlier one")
    digest = received_digest(state, sent)
    policy = site.policy()
    Approvals(site).check(plan, policy)
    check_plan(plan, policy)
    if policy.tell.example_count == "declared" and policy.tell.declared_examples is not None:
        check_number(plan, policy, policy.tell.declared_examples, declarable)
    _check_values(state, "state")
    _check_values(sent, "further tensors")
    holdings = site.counted(plan)
    account = Account(plan, policy, site, holdings, round=round)
    examples = account.public_examples  # what is decided from here on is decided by this number alone
    check_number(plan, policy, examples, declarable)
    check_consent(plan, policy, examples)
    finished = site.kept(plan.plan_id, round, digest)
    if finished is not None:
        return finished
    check_consent(plan, policy, examples, account.hours())
    check_examples(examples, stage.local, site.organization)
    model = model_here(plan, site)
    limit_gpu_memory(policy, model.device)
    model.load(state)
    names = trained_names(plan, model, round)
    personal = Personal(plan, site, model, round, admitted)
    _check_state(state, personal.shared)
    _check_sent(sent, state)
    correction = Correction(plan, site, admitted, sent)
    own_rank = RankMask(plan, stage, policy, model)
    received = own_rank.held(model, personal.joined(state))
    parameters = model.train_only(names)
    batch = stage.local.sample_rate(examples) * examples
    setting = setting_of(plan, stage, model, holdings, state, site.organization, expected_batch=batch)
    optimizer = optimizer_of(stage.local, model, names, parameters)
    named = dict(zip(names, parameters, strict=True))
    guard = Guard(model, {name: received[name] for name in names}, noise=account.budget is not None)
    teller = Disclosures(account)
    if isinstance(plan.privacy, RecordPrivacy):
        account.check_unanswered(round)
        sigma = account.plan_noise(round)  # refuses before anything is charged
        told = _tell(teller, setting, account, round)
        noise = stated_noise(account, sigma, stage, optimizer, {name: named[name] for name in personal.shared})
        with correction.applied(optimizer, named), own_rank.applied(optimizer, named):
            steps = _train_privately(account, plan.privacy, sigma, stage, round, setting, optimizer, guard)
        spent: float | None = account.stated_epsilon()
    else:
        account.leave_unprotected(round, "training")
        told = _tell(teller, setting, account, round)
        with correction.applied(optimizer, named), own_rank.applied(optimizer, named):
            steps = _train_plainly(plan, stage, site, round, setting, optimizer, guard, examples)
            spent = None
            noise = None
    delta = own_rank.sent(difference(model.state(personal.shared), received))
    _check_finite(delta)
    statistics = statistics_of(plan, model, personal.shared, setting)
    update = Update(site.organization, round, delta, examples, steps, spent, told, noise, statistics, digest)
    correction.keep(round, stage, delta)
    personal.keep()
    site.keep(update, plan.plan_id)
    if account.budget is not None:
        account.answered(round)
    return update


def _check_values(tensors: Mapping[str, Tensor], what: str) -> None:
    """Before a record is read: what came is finite, and of a size that parameters have."""
    for name, tensor in tensors.items():
        most = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not most <= _MOST_VALUE:
            raise RunError(f"the request's {what} reach {most:.3g} in {name[:80]}: expected values of at most {_MOST_VALUE:g}")


def _check_state(state: State, names: Sequence[str]) -> None:
    """Before anything is charged: the request must hold what the stage trains."""
    lacking = [name for name in names if name not in state]
    if lacking:
        raise RunError(f"the request's state lacks {lacking[0]}: expected every parameter that the stage trains")


def _check_sent(sent: Mapping[str, Tensor], state: State) -> None:
    """Before anything is charged: what comes beside the state is about its parameters."""
    for name, tensor in sent.items():
        if name not in state or tensor.shape != state[name].shape:
            raise RunError(
                f"the request sends {name[:80]} {tuple(tensor.shape)} beside the state: expected a parameter of the state, in its"
                " shape"
            )


def _train_privately(
    account: Account,
    privacy: RecordPrivacy,
    sigma: float,
    stage: Stage,
    round: int,
    setting: TrainingSetup,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
) -> int:
    """Returns the steps taken. The ledger is charged before a record enters a batch."""
    check_gradients(setting, privacy, stage.mode)
    examples = account.public_examples
    rate = stage.local.sample_rate(examples)
    planned = stage.local.steps_of(examples)
    charge = account.reserve(round, Steps(sigma, rate, planned))
    began = time.monotonic()
    reports = private_steps(
        setting.module,
        optimizer,
        setting.loss,
        units=setting.units,
        batches=setting.batches,
        noise_multiplier=sigma,
        clip_norm=privacy.clip_norm,
        sample_rate=rate,
        expected_batch=rate * examples,
        steps=planned,
        clipping=privacy.clipping,
    )
    taken = _follow(_in_time(reports, account), account.site.organization, round, account.epsilon(), guard)
    account.ledger.settle(charge, taken, time.monotonic() - began)
    return taken


def _in_time(reports: Iterator[StepReport], account: Account) -> Iterator[StepReport]:
    """The same, until the policy's hours are over: then Declined is raised, and the round counts as reserved."""
    began = time.monotonic()
    before = account.hours()
    most = account.policy.training.max_hours
    for report in reports:
        yield report
        hours = before + (time.monotonic() - began) / 3600
        if hours >= most and report.step < report.steps:
            raise Declined("training.max_hours", f"the plan has trained for {hours:.1f} hours, expected at most {most:g}")


def _tell(teller: Disclosures, setting: TrainingSetup, account: Account, round: int) -> dict[str, float]:
    """What else the organization says, about its records and the received model."""
    counts = list(account.holdings.label_counts().values())
    return {
        **teller.histogram(counts),
        **teller.metrics(lambda: _correct(setting), round),
        **teller.loss(lambda ceiling: _total_loss(setting, ceiling), account.true_examples, round),
    }


@torch.no_grad()
def _correct(setting: TrainingSetup) -> tuple[float, int]:
    """How many units the module classifies rightly, of how many; of a unit, the fraction of its records."""
    right = (float(setting.correct(batch)[: len(weights)].double().cpu() @ weights) for weights, batch in setting.everything())
    return sum(right), len(setting.units)


@torch.no_grad()
def _total_loss(setting: TrainingSetup, ceiling: float) -> float:
    """Σ min(ℓ_i, ceiling), of a unit the mean over its records, so that it changes the sum by the ceiling at most.

    A record whose loss is not a number counts for the ceiling, as a failure would tell of it.
    """
    losses = ((setting.loss(batch)[: len(weights)].double().cpu(), weights) for weights, batch in setting.everything())
    known = ((loss.nan_to_num(nan=ceiling, posinf=ceiling).clamp(0.0, ceiling), weights) for loss, weights in losses)
    return sum(float(loss @ weights) for loss, weights in known)


def _train_plainly(
    plan: Plan,
    stage: Stage,
    site: Site,
    round: int,
    setting: TrainingSetup,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    examples: int,
) -> int:
    """The same batches by Poisson sampling, but reproducible, and without clipping and noise. An empty batch takes no step."""
    generator = seeded_generator(plan.seed, "batches", site.organization, round)
    rate = stage.local.sample_rate(examples)
    steps = stage.local.steps_of(examples)
    sampler = PoissonSampler(setting.rows, rate, steps, generator)
    return _follow(_plain_steps(setting, optimizer, sampler), site.organization, round, None, guard)


def _plain_steps(setting: TrainingSetup, optimizer: torch.optim.Optimizer, sampler: PoissonSampler) -> Iterator[StepReport]:
    for step, batch in enumerate(sampler, start=1):
        optimizer.zero_grad()
        total = 0.0
        for _, rows in setting.batches(batch):
            loss = setting.loss(rows).sum() / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if batch:
            optimizer.step()
        yield StepReport(step, len(sampler), total if batch else None)


def _follow(reports: Iterator[StepReport], organization: str, round: int, spent: float | None, guard: Guard) -> int:
    """Runs the steps to the end, checks the first, and tells local observers of each; returns how many were taken.

    spent: ε with this round, which is reserved already.
    """
    taken = 0
    for report in reports:
        guard.after_step(report)
        taken = report.step
        tell(
            "step",
            organization=organization,
            round=round,
            step=report.step,
            steps=report.steps,
            loss=report.loss,
            epsilon=spent,
        )
    guard.after_round()
    return taken


def _check_finite(delta: Mapping[str, Tensor]) -> None:
    """A diverged model is not sent."""
    if not_finite(delta):
        raise RunError("the local model is not finite any more: expected finite parameters; lower local.learning_rate")
