"""Client-level (central) differential privacy: what released models may reveal about a whole organization.

DP-FedAvg (McMahan et al., ICLR 2018) with a public divisor: every update is clipped to the norm C, the clipped updates are summed
with equal weights, and the round's delta is (Σ clipped + N(0, (zC)² I)) / K, where K is the expected number of participants. One
organization changes the sum by C at most, so that a round is one Gaussian mechanism with noise multiplier z. z is calibrated once
for all rounds of the plan.

With adaptive clipping (Andrew et al., NeurIPS 2021) each update also contributes a bit b_k = 1 if it was within C, and C follows
a quantile of the norms: C ← C·exp(−η(b̃ − γ)) with b̃ = ½ + (Σ (b_k − ½) + N(0, σ_b²)) / K. Shifted by ½, an organization
changes the sum of bits by ½; with z_Δ = (z⁻² − (2σ_b)⁻²)^(−½) on the updates, both together cost exactly one Gaussian of
multiplier z.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps, calibrate
from cotune.privacy.config import ClientPrivacy
from cotune.privacy.mechanisms.grid_noise import add_gaussian_noise, choose_grid
from cotune.privacy.mechanisms.random_generators import private_generator
from cotune.strategies.types import Delta, Update

_BITS = 20  # σ_b = K/20 (Andrew et al., section 3)


@dataclass(frozen=True)
class RoundNoise:
    """The noise of one round.

    Attributes:
        charge: What the round costs, a Gaussian of multiplier z at rate q.
        updates: z_Δ, noise standard deviation of the sum of updates / C; z itself with fixed clipping.
        bits: σ_b, noise standard deviation of the sum of bits; None with fixed clipping.
        expected: K, the expected number of participants.
    """

    charge: Steps
    updates: float
    bits: float | None
    expected: float


def calibrate_round_noise(privacy: ClientPrivacy, *, rounds: int, organizations: int, sample_rate: float) -> RoundNoise:
    """Return the noise with which all rounds of a plan together stay within ε.

    Args:
        privacy: The plan's `client_privacy` table.
        rounds: Of the plan.
        organizations: How many are registered.
        sample_rate: The probability with which an organization takes part in a round.

    Raises:
        PrivacyError: Where δ promises nothing for so few organizations, ε is out of reach, or σ_b is too small for z.
    """
    if privacy.delta * organizations >= 1:
        raise PrivacyError(
            f"client_privacy.delta = {privacy.delta:g} for {organizations} organizations promises nothing: expected less than"
            f" 1/{organizations}, such as 1e-5",
            code="privacy.delta_too_large",
        )
    rate = sample_rate if privacy.amplification else 1.0
    z = calibrate([(rate, rounds)], epsilon=privacy.epsilon, delta=privacy.delta)
    expected = sample_rate * organizations
    charge = Steps(z, rate, 1)
    if privacy.clipping == "fixed":
        return RoundNoise(charge, z, None, expected)
    bits = max(expected / _BITS, z) if privacy.bit_noise is None else privacy.bit_noise
    if 2 * bits <= z:
        raise PrivacyError(
            f"client_privacy.bit_noise = {bits:g} would by itself cost more than the round's noise multiplier {z:.4g} allows:"
            f" expected more than {z / 2:.4g}; leave it out for {max(expected / _BITS, z):.4g}",
            code="privacy.bit_noise_too_small",
        )
    return RoundNoise(charge, (z**-2 - (2 * bits) ** -2) ** -0.5, bits, expected)


def next_clip_norm(privacy: ClientPrivacy, clip_norm: float, unclipped: float) -> float:
    """Return C·exp(−η(b̃ − γ)): a smaller bound where more updates than the target quantile were within C, a larger one where
    fewer.

    Args:
        privacy: Gives η (`clip_learning_rate`) and γ (`target_quantile`).
        clip_norm: C of the round before.
        unclipped: b̃, the noised fraction of updates within C. It is cut to [0, 1] (post-processing), because with few
            organizations its noise would dominate C.
    """
    fraction = min(1.0, max(0.0, unclipped))
    return clip_norm * math.exp(-privacy.clip_learning_rate * (fraction - privacy.target_quantile))


_MARGIN = 1 - 1e-12  # keeps a clipped norm within C after rounding


def clip_update(delta: Delta, clip_norm: float) -> tuple[dict[str, Tensor], bool]:
    """Return the delta in float64, scaled to an L2 norm of at most C over all its tensors; and whether it was within C already.

    Raises:
        ValueError: For values that are not finite; update validation rejects those before.
    """
    wide = {name: tensor.to(torch.float64) for name, tensor in delta.items()}
    norm = math.sqrt(sum(float(tensor.pow(2).sum()) for tensor in wide.values()))
    if not math.isfinite(norm):
        raise ValueError("expected a delta of finite values")
    if norm <= clip_norm:
        return wide, True
    return {name: tensor * (clip_norm / norm * _MARGIN) for name, tensor in wide.items()}, False


class PrivateMean:
    """The mean (Σ Q(clipped) + round(N(0, (zC)² I))) / K of a round, fed one update at a time; only the running sum is held.

    Q rounds each update to the grid of `grid_noise`, on which the sum is exact and the noise lies too, so that low bits
    reveal nothing. Guarantee: adding or removing one update changes the sum by C at most, whatever it holds and whatever number
    of examples it declares; `result` and `unclipped` are the noised sums over K. Every parameter of `shapes` gets
    noise, no matter who sent it.

    Args:
        shapes: The shared parameters.
        clip_norm: C.
        noise: Of the round.
        generator: For tests only; no plan can reach it.

    Attributes:
        unclipped: b̃, the noised fraction of updates within C; None before `result`, and with fixed clipping.

    Raises:
        ValueError: For a clip norm that is not positive and finite.
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
        self._grid = choose_grid(clip_norm, noise.updates, sum(tensor.numel() for tensor in shapes.values()))
        self._bits = 0.0  # Σ (b_k − ½)
        self._released = False
        self.unclipped: float | None = None  # b̃, once released, with adaptive clipping

    def add(self, update: Update) -> None:
        """Add an update's contribution.

        Raises:
            KeyError: For a parameter that the round does not share.
        """
        delta, within = clip_update(update.delta, self._grid.max_norm)
        for name, tensor in delta.items():
            self._sums[name].add_(tensor.div(self._grid.step).round_().mul_(self._grid.step))
        self._bits += 0.5 if within else -0.5

    def result(self) -> Delta:
        """Draw the noise and return the mean.

        Raises:
            RuntimeError: When called again: a second draw would be a second release.
        """
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
