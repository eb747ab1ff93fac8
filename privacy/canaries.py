"""Canaries: made-up records beside the real ones whose presence can be read off a trained model as well as the noise allows.

Each canary owns one parameter that nothing else touches, and its loss is a steep line in it. Its gradient is therefore clipped to
exactly C, orthogonal to that of every other record, whatever the model does. What a step of DP-SGD then does to that parameter is
the mechanism itself, at its worst case. Random inputs with random labels, in comparison, show nothing: not even missing clipping.

A record that is held out stays a row, which contributes nothing: the number of rows, and with it the batch size that a sum is
divided by, does not tell who is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cotune.privacy.dp_sgd import Batch, LossPerExample

__all__ = ["Coins", "Planted", "fair_coins", "new_canaries", "plant"]

Coins = np.ndarray[Any, np.dtype[np.bool_]]

_STEEPNESS = 100.0  # times C: the gradient's norm before it is clipped
_RECORD, _NOBODY = 0, -1  # instead of a canary's number, which starts at 1
_KEY = "canary"


def fair_coins(count: int, generator: np.random.Generator) -> Coins:
    """Who is in: independent, each with probability one half."""
    return generator.integers(2, size=count).astype(bool)


class _Beside(nn.Module):
    """A module with the canaries' parameters beside it. Called is only the module, by its own loss."""

    def __init__(self, module: nn.Module, canaries: nn.Embedding) -> None:
        super().__init__()
        self.module, self.canaries = module, canaries


@dataclass(frozen=True)
class Planted:
    """What `private_steps` trains on, in place of what it was planted into."""

    module: nn.Module
    canaries: Tensor  # the parameters, one for each after the first
    rows: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    loss: LossPerExample


class _Rows(Dataset[Any]):
    """Pairs of a real row and what it stands for: itself, nobody, or a canary (whose real row lends its shape only)."""

    def __init__(self, records: Sequence[Any], records_in: Coins, canaries_in: Coins) -> None:
        self.records, self.records_in, self.canaries_in = records, records_in, canaries_in

    def __len__(self) -> int:
        return len(self.records) + len(self.canaries_in)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        canary = index - len(self.records)
        if canary >= 0:
            return self.records[0], canary + 1 if self.canaries_in[canary] else _NOBODY
        return (self.records[index], _RECORD) if self.records_in[index] else (self.records[0], _NOBODY)


def new_canaries(count: int, device: torch.device) -> nn.Embedding:
    """One parameter per canary, at zero, and one at the front that nobody owns."""
    canaries = nn.Embedding(count + 1, 1, padding_idx=0, device=device)
    nn.init.zeros_(canaries.weight)
    return canaries


def plant(
    module: nn.Module,
    records: Sequence[Any],
    collate: Callable[[Sequence[Any]], Batch],
    loss: LossPerExample,
    *,
    canaries: nn.Embedding,
    canaries_in: Coins,
    records_in: Coins,
    clip_norm: float,
) -> Planted:
    """Puts the canaries beside the records, and takes the records out that are not to be in.

    canaries_in: (m,), which canaries are in. records_in: (n,), which records are; there must be at least one record. Guarantee: a
    row that is in for itself has the loss, and the gradient in the module, that it would have without canaries; a canary's
    gradient is 100·C in its own parameter and zero elsewhere; a row that is held out has a gradient of zero.
    """
    if len(canaries_in) != canaries.num_embeddings - 1 or len(records_in) != len(records):
        raise ValueError(
            f"expected a coin for each of {canaries.num_embeddings - 1} canaries and {len(records)} records,"
            f" got {len(canaries_in)} and {len(records_in)}"
        )

    def collate_all(rows: list[Any]) -> Batch:
        return {**collate([row for row, _ in rows]), _KEY: torch.tensor([number for _, number in rows])}

    def loss_of_all(batch: Batch) -> Tensor:
        of_record = loss({key: value for key, value in batch.items() if key != _KEY})
        number = batch[_KEY].to(of_record.device)
        of_canary = _STEEPNESS * clip_norm * canaries(number.clamp(min=0)).squeeze(-1)
        return torch.where(number == _RECORD, of_record, torch.where(number > 0, of_canary, torch.zeros_like(of_canary)))

    rows = _Rows(records, records_in, canaries_in)
    return Planted(_Beside(module, canaries), canaries.weight, rows, collate_all, loss_of_all)
