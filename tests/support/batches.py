"""Toy records as the engine wants them: numbers of rows in, batches of a fixed number of slots out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cotune.privacy.mechanisms.per_example import Batch, Batches


def stack(records: Sequence[Batch]) -> Batch:
    return {key: torch.stack([record[key] for record in records]) for key in records[0]}


def blank(like: Batch) -> Batch:
    """A row of zeros whose label "y" is none."""
    return {key: torch.tensor(-100) if key == "y" else torch.zeros_like(value) for key, value in like.items()}


def in_batches(
    records: Sequence[Any], slots: int, collate: Callable[[list[Any]], Batch] = stack, *, fill: bool = True
) -> Batches:
    """Batches of so many slots, the last ones blank; without `fill` as many as there are rows."""

    def batches(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Batch]]:
        for start in range(0, len(rows), slots):
            positions = range(start, min(start + slots, len(rows)))
            items = [records[rows[p]] for p in positions]
            missing = [blank(items[0])] * (slots - len(items)) if fill else []
            yield positions, collate([*items, *missing])

    return batches
