"""Canaries: synthetic records beside the real ones, whose presence is as detectable in a trained model as the noise permits.

Each canary has its own parameter, which nothing else touches, and its loss is a steep linear function of it. Its gradient is
therefore clipped to exactly C and orthogonal to that of every other record, whatever the model does. A step of DP-SGD acts on
that parameter as the mechanism itself does in the worst case. Random inputs with random labels, in comparison, reveal nothing,
not even missing clipping.

A record that is left out remains as a row that contributes nothing, so that the number of rows, and with it the batch size by
which a sum is divided, does not reveal who is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cotune.privacy.mechanisms.per_example import Batch, Batches, LossPerExample, Unit

Coins = np.ndarray[Any, np.dtype[np.bool_]]

_STEEPNESS = 100.0  # times C: the gradient's norm before it is clipped
# instead of a canary's number, which starts at 1
_RECORD = 0
_NOBODY = -1
_KEY = "canary"


def flip_coins(count: int, generator: np.random.Generator) -> Coins:
    """Draw who is in, each independently with probability one half."""
    return generator.integers(2, size=count).astype(bool)


class _WithCanaries(nn.Module):
    """A module with the canaries' parameters beside it. Called is only the module, by its own loss."""

    def __init__(self, module: nn.Module, canaries: nn.Embedding) -> None:
        super().__init__()
        self.module = module
        self.canaries = canaries


@dataclass(frozen=True)
class PlantedCanaries:
    """What `DPSGD` trains on, in place of what it was planted into."""

    module: nn.Module
    canaries: Tensor  # the parameters, one for each after the first
    units: Sequence[Unit]
    batches: Batches
    loss: LossPerExample


def build_canaries(count: int, device: torch.device) -> nn.Embedding:
    """One parameter per canary, at zero, and one at the front that nobody owns."""
    canaries = nn.Embedding(count + 1, 1, padding_idx=0, device=device)
    nn.init.zeros_(canaries.weight)
    return canaries


def plant(
    module: nn.Module,
    units: Sequence[Unit],
    batches: Batches,
    loss: LossPerExample,
    *,
    canaries: nn.Embedding,
    canaries_in: Coins,
    units_in: Coins,
    clip_norm: float,
    rows_each: int = 1,
) -> PlantedCanaries:
    """Put canaries, each a unit of `rows_each` rows, beside the units, and take the units out that are not to be in.

    A canary's row lends its shape from the first unit's first row. Rows of canaries have numbers after those of all units.

    Args:
        canaries_in: (m,), which canaries are in.
        units_in: (n,), which units are; there must be at least one unit.
        rows_each: Rows of a canary, each with the canary's gradient: clipped by itself, it would contribute `rows_each` times C.

    Guarantee: a unit that is in has the losses, and the gradient in the module, that it would have without canaries; a canary's
    gradient is 100·C in its own parameter and zero elsewhere; what is held out has a gradient of zero.

    Raises:
        ValueError: For coins that do not fit the canaries or the units.
    """
    if len(canaries_in) != canaries.num_embeddings - 1 or len(units_in) != len(units):
        raise ValueError(
            f"expected a coin for each of {canaries.num_embeddings - 1} canaries and {len(units)} units,"
            f" got {len(canaries_in)} and {len(units_in)}"
        )
    lender = units[0][0]
    first = 1 + max(row for unit in units for row in unit)  # number of the first canary's row
    absent = {row for unit, present in zip(units, units_in, strict=True) if not present for row in unit}

    def standing_for(row: int) -> int:
        """Itself, nobody, or a canary by its number."""
        if row < first:
            return _NOBODY if row in absent else _RECORD
        canary = (row - first) // rows_each
        return canary + 1 if canaries_in[canary] else _NOBODY

    def batches_of_all(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Batch]]:
        for positions, batch in batches([row if row < first else lender for row in rows]):
            numbers = torch.full((len(next(iter(batch.values()))),), _NOBODY)
            numbers[: len(positions)] = torch.tensor([standing_for(rows[p]) for p in positions])
            yield positions, {**batch, _KEY: numbers}

    def loss_of_all(batch: Batch) -> Tensor:
        of_record = loss({key: value for key, value in batch.items() if key != _KEY})
        number = batch[_KEY].to(of_record.device)
        of_canary = _STEEPNESS * clip_norm * canaries(number.clamp(min=0)).squeeze(-1)
        return torch.where(number == _RECORD, of_record, torch.where(number > 0, of_canary, torch.zeros_like(of_canary)))

    own = (range(first + i * rows_each, first + (i + 1) * rows_each) for i in range(len(canaries_in)))
    everybody = [*units, *own]
    return PlantedCanaries(_WithCanaries(module, canaries), canaries.weight, everybody, batches_of_all, loss_of_all)
