"""What a stage trains on at an organisation: a module, its records as rows, how they become batches, the loss of each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.client.observe import tell
from cotune.models.device import bfloat16_is_fast
from cotune.models.errors import DataError, PrivacyError
from cotune.models.features import FeatureHead, encode_batch, feature_head
from cotune.models.holdings import Holdings
from cotune.models.independence import check_independence
from cotune.models.sharing import SharedModel, State
from cotune.models.tasks import Example, example_losses, logits
from cotune.models.text_task import IGNORED
from cotune.plan.schema import LocalTraining, Plan, Stage
from cotune.privacy.accounting import RecordPrivacy
from cotune.privacy.dp_sgd import Batch, ClippingMode, check_clipping

__all__ = ["Setting", "check_gradients", "check_stages", "made_up_setting", "optimizer_of", "setting_of"]

_FEATURE_BATCH = 4096  # gradients of a head on features are small
_MAX_GRADIENT_ERROR = 1e-3  # of the clipped sum; correct modes are below 1e-5 in float32


@dataclass(frozen=True)
class Setting:
    """What a stage trains on: a module, its records, how they become batches, and the loss of each example."""

    module: nn.Module
    rows: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    loss: Callable[[Batch], Tensor]
    samples: Callable[[], list[Batch]]  # made-up batches of one, to check gradients with
    exact: Callable[[Batch], Tensor]  # the same loss in float32, to check gradients with
    correct: Callable[[Batch], int]  # how many records of a batch the module classifies rightly
    clipping: ClippingMode
    physical_batch: int


def setting_of(plan: Plan, stage: Stage, model: SharedModel, holdings: Holdings, state: State, name: str) -> Setting:
    """The stage's setting on the records of the organisation `name`; the model must be set to `state`."""
    if holdings.task != plan.task:
        raise DataError(
            f"{name} describes its records as for {holdings.task}, expected {plan.task} as in the plan: mend its description of"
            " holdings, or take no part in this plan"
        )
    head = feature_head(model) if stage.mode == "head" else None
    if head is not None:
        features = holdings.features(
            model,
            state,
            plan.model.precision,
            lambda done, total: tell("features", organisation=name, done=done, total=total),
        )
        return _on_features(head, features, holdings.targets, model.device)
    return _on_examples(plan, stage, model, holdings)


def made_up_setting(plan: Plan, stage: Stage, model: SharedModel, records: int) -> Setting:
    """The stage's setting on so many made-up records, as long as the plan allows: what it costs, without any record."""
    task, reader = model.loaded.task, model.loaded.reader
    nothing = Holdings((), plan.labels, plan.task)
    samples = [_lengthened(example, model.loaded.max_length) for example in task.samples(reader)]
    rows = [samples[i % len(samples)] for i in range(records)]
    head = feature_head(model) if stage.mode == "head" else None
    if head is not None:
        vectors = encode_batch(model, samples, plan.model.precision)
        return _on_features(
            head, vectors[[i % len(samples) for i in range(records)]], [i % 2 for i in range(records)], model.device
        )
    return replace(_on_examples(plan, stage, model, nothing), rows=rows)


def _lengthened(example: Example, length: int) -> Example:
    """An example of tokens, repeated to the full length; one without tokens as it is."""
    tokens = example.get("input_ids")
    if tokens is None:
        return example
    times = -(-length // len(tokens))
    return {key: (value * times)[:length] if isinstance(value, list) else value for key, value in example.items()}


def check_stages(plan: Plan, model: SharedModel) -> None:
    """Before a run: every stage has something to train, and under privacy its gradients are clipped record by record.

    Raises ModelError or PrivacyError. A head on features is a small model without surprises; it is checked when it is trained.
    """
    model.load({})
    nothing = Holdings((), plan.labels, plan.task)
    for stage in plan.stages:
        model.train_only(model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings))
        on_features = stage.mode == "head" and feature_head(model) is not None
        if isinstance(plan.privacy, RecordPrivacy):
            check_independence(model, stage.mode, plan.model.precision, slots=stage.local.physical_batch_size + 1)
        if isinstance(plan.privacy, RecordPrivacy) and not on_features:
            check_gradients(_on_examples(plan, stage, model, nothing), plan.privacy, stage.mode)


def check_gradients(setting: Setting, privacy: RecordPrivacy, mode: str) -> float:
    """The relative error of the clipped sum over made-up records against gradients taken one record at a time.

    Raises PrivacyError when it is more than rounding: then this model cannot be trained privately in this mode.
    """
    clip, clipping = privacy.clip_norm, privacy.clipping
    try:
        error = check_clipping(setting.module, setting.exact, setting.samples(), clip, setting.clipping, clipping=clipping)
    except (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError, KeyError) as raised:
        reason = (str(raised).strip() or type(raised).__name__).splitlines()[0][:160]
        raise PrivacyError(
            f"train = {mode} cannot be had with differential privacy for this model ({reason}): expected a gradient for each"
            " record; use another train mode or model"
        ) from None
    if not error <= _MAX_GRADIENT_ERROR:
        raise PrivacyError(
            f"the clipped gradients of this model are wrong by {error:.2g} (relative) in train = {mode}, expected at most"
            f" {_MAX_GRADIENT_ERROR:g}: use another train mode or model"
        )
    return error


def _on_features(head: FeatureHead, features: Tensor, targets: list[int], device: torch.device) -> Setting:
    labels = torch.tensor(targets)

    def collate(rows: Sequence[int]) -> Batch:
        index = torch.as_tensor(rows)
        return {"features": features[index].to(device), "labels": labels[index].to(device)}

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(head(batch["features"]).logits.float(), batch["labels"], reduction="none")

    def samples() -> list[Batch]:
        rows = torch.linspace(-1, 1, 3 * features.shape[1], device=device).reshape(3, 1, -1)
        return [{"features": row, "labels": torch.tensor([i % 2], device=device)} for i, row in enumerate(rows)]

    def correct(batch: Batch) -> int:
        return int((head(batch["features"]).logits.argmax(dim=1) == batch["labels"]).sum())

    return Setting(head, range(len(labels)), collate, loss, samples, loss, correct, "hooks", _FEATURE_BATCH)


def _on_examples(plan: Plan, stage: Stage, model: SharedModel, holdings: Holdings) -> Setting:
    task, reader = model.loaded.task, model.loaded.reader
    collate = task.collator(model.module, reader, model.device)
    low_precision = stage.mode != "full" and (  # ghost clipping finds norms by products: in bfloat16 they would not bound
        plan.model.precision == "bfloat16"
        or (plan.model.precision == "auto" and model.device.type == "cuda" and bfloat16_is_fast(model.device))
    )

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=low_precision):
            return example_losses(model.module, batch)

    def samples() -> list[Batch]:
        """With the padding that they have in one batch: they are put together again."""
        together = collate(task.samples(reader))
        return [{key: value[i : i + 1] for key, value in together.items()} for i in range(len(together["labels"]))]

    def exact(batch: Batch) -> Tensor:
        return example_losses(model.module, batch)

    def correct(batch: Batch) -> int:
        """Records, whatever the task: of tags, all words of a record must be told rightly."""
        labels = batch["labels"]
        right = (logits(model.module, batch).argmax(dim=-1) == labels) | (labels == IGNORED)
        return int(right.reshape(len(right), -1).all(dim=1).sum())

    clipping: ClippingMode = "ghost" if stage.mode == "full" else "hooks"
    rows = holdings.examples(model)
    return Setting(model.module, rows, collate, loss, samples, exact, correct, clipping, stage.local.physical_batch_size)


def optimizer_of(
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
