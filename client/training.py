"""One round at an organisation: from the state of the shared model to an update, charged to its ledger before it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cotune.client.budget import check_examples, noise_multiplier
from cotune.client.noise import noise_variance
from cotune.client.observe import tell
from cotune.client.setting import Setting, optimizer_of, setting_of
from cotune.client.site import Site
from cotune.models.errors import PrivacyError, RunError
from cotune.models.sharing import State
from cotune.plan.model import model_of
from cotune.plan.schema import Plan, Stage
from cotune.privacy.accounting import RecordPrivacy, Steps, epsilon
from cotune.privacy.dp_sgd import StepReport, check_clipping, private_steps
from cotune.privacy.ledger import Ledger
from cotune.privacy.randomness import PoissonSampler, seeded_generator
from cotune.strategies.updates import Update, difference
from cotune.strategies.wire import state_digest

__all__ = ["train_round"]

_MAX_GRADIENT_ERROR = 1e-3  # of the clipped sum; correct modes are below 1e-5 in float32


class _Rows(Dataset[Any]):
    """Records by number; asked for a whole batch at a time."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def train_round(plan: Plan, site: Site, round: int, state: State) -> Update:
    """Trains one round from `state` and returns the update; the same request again gets the same update, without training.

    Raises DataError when the organisation's records cannot be used, PrivacyError when its budget does not suffice.
    """
    digest = state_digest(state)
    finished = site.kept(plan.plan_id, round, digest)
    if finished is not None:
        return finished
    holdings = site.holdings(plan.labels)
    stage = plan.stage_of(round)
    check_examples(len(holdings), stage.local, site.organisation)
    model = model_of(plan, site.file.device)
    model.load(state)
    names = model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings)
    _check_state(state, names)
    parameters = model.train_only(names)
    setting = setting_of(plan, stage, model, holdings, state, site.organisation)
    optimizer = optimizer_of(stage.local, model, names, parameters)
    if isinstance(plan.privacy, RecordPrivacy):
        steps, spent, scale = _train_privately(plan, plan.privacy, stage, site, round, setting, optimizer)
        named = dict(zip(names, parameters, strict=True))
        noise = noise_variance(stage.local, optimizer, named, scale=scale, steps=steps)
    else:
        steps, spent, noise = _train_plainly(plan, stage, site, round, setting, optimizer), None, None
    delta = difference(model.state(names), {name: state[name] for name in names})
    _check_moved(delta)
    update = Update(site.organisation, round, delta, len(holdings), steps, spent, noise)
    site.keep(update, plan.plan_id, digest)
    return update


def _check_state(state: State, names: Sequence[str]) -> None:
    """Before anything is charged: the request must hold what the stage trains, and finite values only."""
    lacking = [name for name in names if name not in state]
    if lacking:
        raise RunError(f"the request's state lacks {lacking[0]}: expected every parameter that the stage trains")
    broken = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise RunError(f"the request's state is not finite in {broken[0]}: expected finite parameters")


def _train_privately(
    plan: Plan,
    privacy: RecordPrivacy,
    stage: Stage,
    site: Site,
    round: int,
    setting: Setting,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float, float]:
    """Returns the steps taken, the ε spent so far, and σC/B, the standard deviation of the noise on a step's gradient.

    The ledger is charged before a record enters a batch.
    """
    examples, ledger = len(setting.rows), site.ledger()
    _check_gradients(setting, privacy.clip_norm)
    sigma = noise_multiplier(plan, privacy, examples, round, ledger.spent())
    rate = stage.local.sample_rate(examples)
    charge = ledger.reserve(plan.plan_id, round, Steps(sigma, rate, stage.local.steps))
    reports = private_steps(
        setting.module,
        optimizer,
        setting.loss,
        _Rows(setting.rows),
        collate=setting.collate,
        noise_multiplier=sigma,
        clip_norm=privacy.clip_norm,
        sample_rate=rate,
        steps=stage.local.steps,
        physical_batch=setting.physical_batch,
        mode=setting.clipping,
    )
    taken = _follow(reports, site.organisation, round, ledger, privacy.delta_for(examples))
    ledger.settle(charge, taken)
    return taken, epsilon(ledger.spent(), privacy.delta_for(examples)), sigma * privacy.clip_norm / (rate * examples)


def _check_gradients(setting: Setting, clip_norm: float) -> None:
    error = check_clipping(setting.module, setting.exact, setting.samples(), clip_norm, setting.clipping)
    if not error <= _MAX_GRADIENT_ERROR:
        raise PrivacyError(
            f"the clipped gradients of this model are wrong by {error:.2g} (relative), expected at most {_MAX_GRADIENT_ERROR:g}:"
            " its architecture cannot be trained with differential privacy in this mode; use another train mode or model"
        )


def _train_plainly(plan: Plan, stage: Stage, site: Site, round: int, setting: Setting, optimizer: torch.optim.Optimizer) -> int:
    """The same batches by Poisson sampling, but reproducible, and without clipping and noise. An empty batch takes no step."""
    generator = seeded_generator(plan.seed, "batches", site.organisation, round)
    rate = stage.local.sample_rate(len(setting.rows))
    sampler = PoissonSampler(len(setting.rows), rate, stage.local.steps, generator)
    return _follow(_plain_steps(setting, optimizer, sampler), site.organisation, round, None, 0.0)


def _plain_steps(setting: Setting, optimizer: torch.optim.Optimizer, sampler: PoissonSampler) -> Iterator[StepReport]:
    for step, batch in enumerate(sampler, start=1):
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(batch), setting.physical_batch):
            rows = [setting.rows[i] for i in batch[start : start + setting.physical_batch]]
            loss = setting.loss(setting.collate(rows)).sum() / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if batch:
            optimizer.step()
        yield StepReport(step, len(sampler), total if batch else None)


def _follow(reports: Iterator[StepReport], organisation: str, round: int, ledger: Ledger | None, delta: float) -> int:
    """Runs the steps to the end and tells local observers of each; returns how many were taken."""
    spent = epsilon(ledger.spent(), delta) if ledger else None  # the round is reserved already
    taken = 0
    for report in reports:
        taken = report.step
        tell(
            "step",
            organisation=organisation,
            round=round,
            step=report.step,
            steps=report.steps,
            loss=report.loss,
            epsilon=spent,
        )
    return taken


def _check_moved(delta: Mapping[str, Tensor]) -> None:
    """What was to be trained has moved, and is finite: an adapter that is not wired in, or a diverged model, is not sent."""
    if not all(bool(d.isfinite().all()) for d in delta.values()):
        raise RunError("the local model is not finite any more: expected finite parameters; lower local.learning_rate")
    still = [name for name, d in delta.items() if not bool(d.any())]
    if len(still) == len(delta):
        raise RunError("no parameter moved in this round: expected every shared parameter to be trained; check the train mode")
