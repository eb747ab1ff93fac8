"""The task: sequence classification. Texts to tokens to batches, the loss of each example, and the metrics of a prediction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Example", "Metrics", "collator", "encode", "example_losses", "majority", "score"]

Example = dict[str, Any]  # {"input_ids": list[int], "labels": int}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Metrics:
    """Quality on a test set, each in [0, 1]; precision, recall and F1 are means over the classes (macro)."""

    accuracy: float
    precision: float
    recall: float
    f1: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def score(truth: Sequence[int], predicted: Sequence[int], classes: int) -> Metrics:
    """Metrics of predicted against true class numbers; a class that is never predicted has precision 0."""
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=list(range(classes)), average="macro", zero_division=0
    )
    return Metrics(float(accuracy_score(truth, predicted)), float(precision), float(recall), float(f1))


def majority(train: Sequence[int], truth: Sequence[int], classes: int) -> Metrics:
    """What always answering the most frequent class of the training data reaches."""
    most = max(range(classes), key=lambda c: (list(train).count(c), -c))
    return score(truth, [most] * len(truth), classes)


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token numbers of each text, cut off at max_length; an empty text is one padding token, so that it has a position."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)["input_ids"] if texts else []
    return [list(row) or [tokenizer.pad_token_id] for row in ids]


def collator(module: nn.Module, tokenizer: Any, device: torch.device) -> Callable[[Sequence[Example]], Batch]:
    """Examples -> a batch on the device: input_ids and attention_mask (b, l), labels (b,), and what the model wants beside.

    Position and token type numbers are passed explicitly, in the batch's shape: looked up once for the whole batch, they would
    have no gradient per example (Opacus: `stack expects each tensor to be equal size`).
    """
    accepted = inspect.signature(module.forward).parameters
    kind = cast(Any, module).config.model_type
    pad = tokenizer.pad_token_id

    def collate(examples: Sequence[Example]) -> Batch:
        rows = [example["input_ids"] for example in examples]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind in ("bert", "distilbert", "gpt2") and "position_ids" in accepted:
            batch["position_ids"] = torch.arange(length).repeat(len(rows), 1)
        if kind == "bert" and "token_type_ids" in accepted:
            batch["token_type_ids"] = torch.zeros_like(ids)
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return {key: value.to(device) for key, value in batch.items()}

    return collate


def logits(module: nn.Module, batch: Batch) -> Tensor:
    """The model's scores (b, classes) in float32."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return cast(Tensor, module(**inputs).logits).float()


def example_losses(module: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each example by itself: (b,)."""
    return functional.cross_entropy(logits(module, batch), batch["labels"], reduction="none")
