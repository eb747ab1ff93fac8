"""Temperature scaling: one number for each model that calibrates its probabilities (Guo et al., ICML 2017, section 4.2)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

_MAX_LOG_TEMPERATURE = 4.0  # T in [1/55, 55]: beyond, a model is constant or an argmax
_MIN_PROBABILITY = 1e-12


def scaled(probabilities: Floats, temperature: float) -> Floats:
    """Return p^(1/T) / Σ p^(1/T), which is softmax(z / T) for the scores z that p = softmax(z) came from.

    Args:
        probabilities: (n, k), rows that add up to 1; rows of NaN stay as they are.
        temperature: T > 0; above 1 probabilities become more alike, below 1 less.

    Returns:
        (n, k), rows that add up to 1.
    """
    shares: Floats = softmax(np.log(np.maximum(probabilities, _MIN_PROBABILITY)) / temperature, axis=1)
    return shares


def fit_temperature(probabilities: Floats, truth: Numbers) -> float:
    """Return the temperature with the smallest negative log-likelihood on held-out records.

    Args:
        probabilities: (n, k), without NaN.
        truth: (n,) class numbers.

    Returns:
        T; 1 where there is no record.
    """
    if not len(truth):
        return 1.0
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(scaled(probabilities, math.exp(log_temperature)), truth)

    bounds = (-_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE)
    return float(math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def negative_log_likelihood(probabilities: Floats, truth: Numbers) -> float:
    """Return −mean log p(true class), in nats."""
    of_truth = probabilities[np.arange(len(truth)), truth]
    return float(-np.log(np.maximum(of_truth, _MIN_PROBABILITY)).mean())
