"""The geometric mechanism for integers, such as a number of records.

It adds noise of the discrete Laplace distribution to an integer; it is ε-private without any δ. It releases
the number of records, from which a run's sample rate, noise, steps and δ follow. A run that follows from an answer cannot be
composed with it as if it had been fixed before: where the answer makes a neighbor likelier, the noise that it leads to may be
smaller too. But every run that can follow is (ε₂, δ)-private by itself, and the answer is ε₁-private, whatever it is; so both
together are (ε₁ + ε₂, δ)-private (Dwork & Roth, "The Algorithmic Foundations of Differential Privacy", 2014, theorem B.1). A
Gaussian answer with the same standard deviation would need an ε₁ four times as large, and a δ of its own.

The mechanism is Ghosh, Roughgarden, Sundararajan, "Universally Utility-Maximizing Privacy Mechanisms", STOC 2009, section 2. Its
privacy loss is ε₁ or -ε₁ and nothing else, like that of randomized response, whose curves are used here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def geometric_epsilon(noise_multiplier: float) -> float:
    """Return ε of a number that one unit changes by one at most, told with noise of this standard deviation.

    P(z) is proportional to exp(-ε·|z|) on the whole numbers, whose variance is 1 / (2·sinh²(ε/2)).
    """
    return 2 * math.asinh(1 / (math.sqrt(2) * noise_multiplier))


def randomized_response(epsilon: float) -> float:
    """Return the probability of the larger privacy loss, e^ε / (1 + e^ε): of every ε-private mechanism the worst case."""
    return 1 / (1 + math.exp(-epsilon))


def geometric_renyi(epsilon: float, order: float) -> float:
    """Return the Rényi divergence at an order α > 1, in nats (Mironov, CSF 2017, https://arxiv.org/abs/1702.07476, table 1)."""
    import numpy as np

    likelier = math.log(randomized_response(epsilon))
    rarer = likelier - epsilon
    return float(np.logaddexp(order * likelier + (1 - order) * rarer, order * rarer + (1 - order) * likelier)) / (order - 1)


def add_geometric_noise(number: int, noise_multiplier: float, generator: np.random.Generator) -> int:
    """Return the number plus the difference of two geometric ones, which is what the discrete Laplace distribution is.

    Args:
        number: What one unit of privacy changes by one at most.
        noise_multiplier: The noise's standard deviation.
        generator: A private one. It draws a geometric number from a float64 of 53 bits, so that tails rarer than 2⁻⁵³ are cut.
    """
    ended = -math.expm1(-geometric_epsilon(noise_multiplier))
    up, down = generator.geometric(ended, size=2).tolist()
    return int(number + up - down)
