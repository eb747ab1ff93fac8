"""Client-level (central) differential privacy: what the models after the server may reveal about a whole organisation.

DP-FedAvg (McMahan et al., ICLR 2018) with a public divisor: every update is clipped to the norm C, the clipped ones are summed
with equal weights, and the round's delta is (Σ clipped + N(0, (zC)² I)) / K, where K is the expected number of participants. One
organisation changes the sum by C at most, so that a round is one Gaussian mechanism of noise multiplier z. z is calibrated once,
for all rounds of the plan.

With adaptive clipping (Andrew et al., NeurIPS 2021) each update also tells b_k = 1 if it was within C, and C follows a quantile
of the norms: C ← C·exp(−η(b̃ − γ)) with b̃ = ½ + (Σ (b_k − ½) + N(0, σ_b²)) / K. Shifted by ½, an organisation changes the sum
of bits by ½; with z_Δ = (z⁻² − (2σ_b)⁻²)^(−½) on the updates, both together cost exactly one Gaussian of multiplier z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cotune.models.errors import PrivacyError
from cotune.privacy.accounting import Steps, calibrate
from cotune.privacy.config import ClientPrivacy

_BITS = 20  # σ_b = K/20 (Andrew et al., section 3)


@dataclass(frozen=True)
class RoundNoise:
    """What one round draws. charge: what it costs, a Gaussian of multiplier z at rate q. updates: z_Δ, noise of the sum in
    units of C (z itself with fixed clipping). bits: σ_b, None with fixed clipping. expected: K."""

    charge: Steps
    updates: float
    bits: float | None
    expected: float


def round_noise(privacy: ClientPrivacy, *, rounds: int, organisations: int, sample_rate: float) -> RoundNoise:
    """The noise with which `rounds` rounds stay within ε, for so many registered organisations.

    Raises PrivacyError where δ is no promise for so few organisations, ε is out of reach, or σ_b is too small for z.
    """
    if privacy.delta * organisations >= 1:
        raise PrivacyError(
            f"client_privacy.delta = {privacy.delta:g} for {organisations} organisations promises nothing: expected less than"
            f" 1/{organisations}, such as 1e-5"
        )
    rate = sample_rate if privacy.amplification else 1.0
    z = calibrate([(rate, rounds)], epsilon=privacy.epsilon, delta=privacy.delta)
    expected = sample_rate * organisations
    charge = Steps(z, rate, 1)
    if privacy.clipping == "fixed":
        return RoundNoise(charge, z, None, expected)
    bits = max(expected / _BITS, z) if privacy.bit_noise is None else privacy.bit_noise
    if 2 * bits <= z:
        raise PrivacyError(
            f"client_privacy.bit_noise = {bits:g} would by itself cost more than the round's noise multiplier {z:.4g} allows:"
            f" expected more than {z / 2:.4g}; leave it out for {max(expected / _BITS, z):.4g}"
        )
    return RoundNoise(charge, (z**-2 - (2 * bits) ** -2) ** -0.5, bits, expected)


def next_clip_norm(privacy: ClientPrivacy, clip_norm: float, unclipped: float) -> float:
    """C·exp(−η(b̃ − γ)): smaller where more than the target quantile was within C, larger where less.

    b̃ is a noised fraction, cut to [0, 1] (post-processing): with few organisations its noise would carry C away.
    """
    fraction = min(1.0, max(0.0, unclipped))
    return clip_norm * math.exp(-privacy.clip_learning_rate * (fraction - privacy.target_quantile))
