"""What anyone who sees every step of DP-SGD sees of its targets: the sampled Gaussian mechanism, simulated."""

from __future__ import annotations

import numpy as np

from cotune.privacy.accounting.composition import Steps


def sums_of_steps(
    steps: Steps, targets: int, rng: np.random.Generator, *, noise: float = 1.0, sensitivity: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return (present, sums): which targets are in, by fair coins, and the (steps, targets) noised sums in units of C.

    Args:
        noise: In units of what is claimed.
        sensitivity: By how much a target that is sampled moves its sum.
    """
    present = rng.random(targets) < 0.5
    sums = np.empty((steps.count, targets))
    for step in range(steps.count):
        sampled = (rng.random(targets) < steps.sample_rate) & present
        sums[step] = sampled * sensitivity + rng.normal(size=targets) * steps.noise_multiplier * noise
    return present, sums
