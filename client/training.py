"""One round at an organisation: from the state of the shared model to an update, charged to its ledger before it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from cotune.client.observe import tell
from cotune.client.site import Site
from cotune.models.device import bfloat16_is_fast
from cotune.models.errors import DataError, PrivacyError, RunError
from cotune.models.features import FeatureHead, feature_head
from cotune.models.holdings import Holdings
from cotune.models.sharing import SharedModel, State
from cotune.models.tasks import collator, example_losses
from cotune.plan.model import model_of
from cotune.plan.schema import LocalTraining, Plan, Stage
from cotune.privacy.accounting import RecordPrivacy, Steps, calibrate, epsilon
from cotune.privacy.dp_sgd import Batch, ClippingMode, StepReport, check_clipping, private_steps
from cotune.privacy.ledger import Ledger
from cotune.privacy.randomness import PoissonSampler, seeded_generator
from cotune.strategies.updates import Update, difference
from cotune.strategies.wire import state_digest

__all__ = ["check_examples", "noise_multiplier", "planned_steps", "train_round"]

_MAX_GRADIENT_ERROR = 1e-3  # of the clipped sum; correct modes are below 1e-5 in float32
_MOST_NOISE = 4.0  # times the calibrated σ; an update with more is nearly pure noise, and would only harm the model
_FEATURE_BATCH = 4096  # gradients of a head on features are small


class _Rows(Dataset[Any]):
    """Records by number; asked for a whole batch at a time."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@dataclass(frozen=True)
class _Setting:
    """What a stage trains on: a module, its records, how they become batches, and the loss of each example."""

    module: nn.Module
    rows: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    loss: Callable[[Batch], Tensor]
    samples: Callable[[], list[Batch]]  # made-up batches of one, to check gradients with
    exact: Callable[[Batch], Tensor]  # the same loss in float32, to check gradients with
    clipping: ClippingMode
    physical_batch: int


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
    setting = _setting(plan, stage, model, holdings, state, site.organisation)
    optimizer = _optimizer(stage.local, model, names, parameters)
    if isinstance(plan.privacy, RecordPrivacy):
        steps, spent = _train_privately(plan, plan.privacy, stage, site, round, setting, optimizer)
    else:
        steps, spent = _train_plainly(plan, stage, site, round, setting, optimizer), None
    delta = difference(model.state(names), {name: state[name] for name in names})
    _check_moved(delta)
    update = Update(site.organisation, round, delta, len(holdings), steps, spent)
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


def check_examples(examples: int, local: LocalTraining, organisation: str) -> None:
    """Raises DataError when the records do not fill a batch."""
    needed = local.batch_size if local.batch_size >= 1 else 1 / local.batch_size
    if examples < needed:
        raise DataError(
            f"{organisation} has {examples} examples, fewer than a batch needs ({needed:g} with local.batch_size ="
            f" {local.batch_size:g}): use fewer organisations, or another batch size"
        )


def _setting(plan: Plan, stage: Stage, model: SharedModel, holdings: Holdings, state: State, name: str) -> _Setting:
    head = feature_head(model) if stage.mode == "head" else None
    if head is not None:
        features = holdings.features(
            model,
            state,
            plan.model.precision,
            lambda done, total: tell("features", organisation=name, done=done, total=total),
        )
        return _on_features(head, features, holdings.targets, model.device)
    return _on_tokens(plan, stage, model, holdings)


def _on_features(head: FeatureHead, features: Tensor, targets: list[int], device: torch.device) -> _Setting:
    labels = torch.tensor(targets)

    def collate(rows: Sequence[int]) -> Batch:
        index = torch.as_tensor(rows)
        return {"features": features[index].to(device), "labels": labels[index].to(device)}

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(head(batch["features"]).logits.float(), batch["labels"], reduction="none")

    def samples() -> list[Batch]:
        rows = torch.linspace(-1, 1, 3 * features.shape[1], device=device).reshape(3, 1, -1)
        return [{"features": row, "labels": torch.tensor([i % 2], device=device)} for i, row in enumerate(rows)]

    return _Setting(head, range(len(labels)), collate, loss, samples, loss, "hooks", _FEATURE_BATCH)


def _on_tokens(plan: Plan, stage: Stage, model: SharedModel, holdings: Holdings) -> _Setting:
    collate = collator(model.module, model.loaded.tokenizer, model.device)
    low_precision = stage.mode != "full" and (  # ghost clipping finds norms by products: in bfloat16 they would not bound
        plan.model.precision == "bfloat16"
        or (plan.model.precision == "auto" and model.device.type == "cuda" and bfloat16_is_fast(model.device))
    )

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=low_precision):
            return example_losses(model.module, batch)

    def samples() -> list[Batch]:
        usable = [i for i in range(len(model.loaded.tokenizer)) if i not in model.loaded.tokenizer.all_special_ids][:300]
        texts = [usable[k::3][:6] for k in range(3)]
        return [collate([{"input_ids": ids, "labels": k % 2}]) for k, ids in enumerate(texts)]

    def exact(batch: Batch) -> Tensor:
        return example_losses(model.module, batch)

    clipping: ClippingMode = "ghost" if stage.mode == "full" else "hooks"
    rows = holdings.examples(model)
    return _Setting(model.module, rows, collate, loss, samples, exact, clipping, stage.local.physical_batch_size)


def _optimizer(
    local: LocalTraining, model: SharedModel, names: list[str], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    head = [p for n, p in zip(names, parameters, strict=True) if not n.startswith(model.prefix)]
    encoder = [p for n, p in zip(names, parameters, strict=True) if n.startswith(model.prefix)]
    head_rate = local.head_learning_rate if encoder and local.head_learning_rate else local.learning_rate
    groups: list[dict[str, Any]] = [{"params": encoder, "lr": local.learning_rate}] if encoder else []
    groups.append({"params": head, "lr": head_rate})
    if local.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=local.momentum, weight_decay=local.weight_decay)
    adam = torch.optim.AdamW if local.optimizer == "adamw" else torch.optim.Adam
    return adam(groups, weight_decay=local.weight_decay)


def planned_steps(plan: Plan, examples: int, first_round: int = 1) -> list[tuple[float, int]]:
    """(sample rate, steps) of every stage from a round on, for an organisation with `examples` records."""
    planned, last = [], 0
    for stage in plan.stages:
        rounds = min(stage.rounds, last + stage.rounds - first_round + 1)
        last += stage.rounds
        if rounds > 0:
            planned.append((stage.local.sample_rate(examples), rounds * stage.local.steps))
    return planned


def noise_multiplier(plan: Plan, privacy: RecordPrivacy, examples: int, round: int, spent: Sequence[Steps]) -> float:
    """σ for the rounds from `round` on: calibrated once for all steps of all rounds, and kept as long as it suffices.

    More than planned may have been spent: a crash in the middle of a round counts. Then the rest of the budget is spread over the
    remaining steps. Raises PrivacyError when there is no rest, or one so small that the update would be little but noise.
    """
    delta = privacy.delta_for(examples)
    sigma = calibrate(planned_steps(plan, examples), epsilon=privacy.epsilon, delta=delta)
    remaining = planned_steps(plan, examples, round)
    if epsilon([*spent, *(Steps(sigma, q, count) for q, count in remaining)], delta) <= privacy.epsilon:
        return sigma
    more = calibrate(remaining, epsilon=privacy.epsilon, delta=delta, spent=spent)
    if more > _MOST_NOISE * sigma:
        raise PrivacyError(
            f"interrupted rounds have used up nearly all of ε = {privacy.epsilon:g}: the rest would need {more / sigma:.0f} times"
            f" the planned noise, expected at most {_MOST_NOISE:g} times; leave the rest to the others, or allow more ε"
        )
    return more


def _train_privately(
    plan: Plan,
    privacy: RecordPrivacy,
    stage: Stage,
    site: Site,
    round: int,
    setting: _Setting,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Returns the steps taken and the ε spent so far. The ledger is charged before a record enters a batch."""
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
    return taken, epsilon(ledger.spent(), privacy.delta_for(examples))


def _check_gradients(setting: _Setting, clip_norm: float) -> None:
    error = check_clipping(setting.module, setting.exact, setting.samples(), clip_norm, setting.clipping)
    if not error <= _MAX_GRADIENT_ERROR:
        raise PrivacyError(
            f"the clipped gradients of this model are wrong by {error:.2g} (relative), expected at most {_MAX_GRADIENT_ERROR:g}:"
            " its architecture cannot be trained with differential privacy in this mode; use another train mode or model"
        )


def _train_plainly(plan: Plan, stage: Stage, site: Site, round: int, setting: _Setting, optimizer: torch.optim.Optimizer) -> int:
    """The same batches by Poisson sampling, but reproducible, and without clipping and noise. An empty batch takes no step."""
    generator = seeded_generator(plan.seed, "batches", site.organisation, round)
    rate = stage.local.sample_rate(len(setting.rows))
    sampler = PoissonSampler(len(setting.rows), rate, stage.local.steps, generator)
    return _follow(_plain_steps(setting, optimizer, sampler), site.organisation, round, None, 0.0)


def _plain_steps(setting: _Setting, optimizer: torch.optim.Optimizer, sampler: PoissonSampler) -> Iterator[StepReport]:
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
