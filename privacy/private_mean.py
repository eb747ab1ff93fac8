"""The mean of a round's updates under client-level differential privacy: clip, sum, add noise, divide by a public number."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cotune.privacy.client_level import RoundNoise
from cotune.privacy.gaussian import add_gaussian_noise, grid_of
from cotune.privacy.randomness import private_generator
from cotune.strategies.updates import Delta, Update

_MARGIN = 1 - 1e-12  # rounding must not carry a clipped norm over C


def clipped(delta: Delta, clip_norm: float) -> tuple[dict[str, Tensor], bool]:
    """The delta in float64, scaled to a norm of at most C over all its tensors; and whether it was within C already.

    A zero delta stays zero. Raises ValueError for values that are not finite: admission refuses those before.
    """
    wide = {name: tensor.to(torch.float64) for name, tensor in delta.items()}
    norm = math.sqrt(sum(float(tensor.pow(2).sum()) for tensor in wide.values()))
    if not math.isfinite(norm):
        raise ValueError("expected a delta of finite values")
    if norm <= clip_norm:
        return wide, True
    return {name: tensor * (clip_norm / norm * _MARGIN) for name, tensor in wide.items()}, False


class PrivateMean:
    """(Σ Q(clipped) + round(N(0, (zC)² I))) / K, fed one update at a time: it holds the running sum, never a second delta.

    Q rounds each update to the grid of `gaussian`, on which the sum is exact and the noise lies too: nothing is left in low bits.
    Guarantee: one update more or less changes the sum by C at most, whatever is in it and whatever examples it declares, and what
    `result` and `unclipped` give are the noised sums over K. Every parameter of `shapes` gets noise, whoever sent something.
    generator: for tests only; no plan can reach it.
    """

    def __init__(
        self, shapes: Mapping[str, Tensor], clip_norm: float, noise: RoundNoise, generator: np.random.Generator | None = None
    ) -> None:
        if not 0 < clip_norm < math.inf:
            raise ValueError(f"expected a positive clip norm, got {clip_norm}")
        self._sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in shapes.items()}
        self._clip_norm = clip_norm
        self._noise = noise
        self._generator = generator or private_generator()
        self._grid = grid_of(clip_norm, noise.updates, sum(tensor.numel() for tensor in shapes.values()))
        self._bits = 0.0  # Σ (b_k − ½)
        self._released = False
        self.unclipped: float | None = None  # b̃, once released, with adaptive clipping

    def add(self, update: Update) -> None:
        """Add an update's contribution. Raises KeyError for a parameter that the round does not share."""
        delta, within = clipped(update.delta, self._grid.clip_norm)
        for name, tensor in delta.items():
            self._sums[name].add_(tensor.div(self._grid.step).round_().mul_(self._grid.step))
        self._bits += 0.5 if within else -0.5

    def result(self) -> Delta:
        """Draw the noise: once, as a second draw would be a second release. Raises RuntimeError when asked again."""
        if self._released:
            raise RuntimeError("the noise of this round was drawn already: expected one release")
        self._released = True
        expected = self._noise.expected
        for name, total in self._sums.items():
            noised = add_gaussian_noise(total, self._clip_norm, self._noise.updates, self._generator)
            self._sums[name] = noised.div_(expected)
        if self._noise.bits is not None:
            bits = add_gaussian_noise(torch.tensor(self._bits, dtype=torch.float64), 1.0, self._noise.bits, self._generator)
            self.unclipped = 0.5 + float(bits) / expected
        return self._sums
