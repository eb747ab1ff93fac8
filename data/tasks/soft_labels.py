"""Texts whose label is a distribution over the classes: what teachers say of each, for a student that learns to say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.text import Example, SequenceClassification


class SoftLabels(SequenceClassification):
    """See `tasks.Task`. A target is a probability for each class; one without any, IGNORED for each.

    Args:
        classes: How many there are.
    """

    label_dtype = torch.float32

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def encode_target(self, target: Any) -> tuple[float, ...]:
        return tuple(map(float, target))

    def missing_target(self, given: Any) -> tuple[float, ...]:
        return (1 / self.classes,) * self.classes

    def label_pool(self, classes: int) -> Tensor:
        return torch.eye(classes)

    def samples(self, reader: Any) -> list[Example]:
        rows = enumerate(super().samples(reader))
        return [{**example, "labels": tuple(float(k % self.classes == c) for c in range(self.classes))} for k, example in rows]

    def blank(self, reader: Any, length: int) -> Example:
        return {**super().blank(reader, length), "labels": (float(IGNORED),) * self.classes}

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        unread = torch.full_like(scores[:1], torch.nan)
        return [unread if IGNORED in e["labels"] else scores[i : i + 1] for i, e in enumerate(examples)]

    def losses(self, module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
        return self.losses_from_scores(self.scores(module, batch), batch["labels"], weights)

    def losses_from_scores(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropies −Σ_c p_c log q_c, (b,): KL(p ‖ q) but for a constant. Exactly 0 for a row without a label."""
        there = labels != IGNORED
        logs = functional.log_softmax(scores, dim=1)
        return -(labels * there * (logs if weights is None else logs * weights)).sum(dim=1)

    def are_right(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Those whose most probable class is that of their label."""
        return (scores.argmax(dim=1) == labels.argmax(dim=1)) | (labels == IGNORED).any(dim=1)
