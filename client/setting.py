"""What a stage trains on at an organisation: a module, its records as rows, how they become batches, the loss of each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.client.observe import tell
from cotune.models.device import bfloat16_is_fast
from cotune.models.features import FeatureHead, feature_head
from cotune.models.holdings import Holdings
from cotune.models.sharing import SharedModel, State
from cotune.models.tasks import collator, example_losses, logits
from cotune.plan.schema import LocalTraining, Plan, Stage
from cotune.privacy.dp_sgd import Batch, ClippingMode

__all__ = ["Setting", "optimizer_of", "setting_of"]

_FEATURE_BATCH = 4096  # gradients of a head on features are small


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


def _on_tokens(plan: Plan, stage: Stage, model: SharedModel, holdings: Holdings) -> Setting:
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

    def correct(batch: Batch) -> int:
        return int((logits(model.module, batch).argmax(dim=1) == batch["labels"]).sum())

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
