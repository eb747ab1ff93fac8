"""Random-effects weights: the more privacy noise an organization's delta contains, the less it counts.

Under DP-SGD the variance v_k of the noise on each coordinate of a delta is known rather than estimated. The model is
Δ_k = Δ + (effect of organization k, variance τ²) + (its privacy noise, variance v_k); the mean of the smallest variance weights
each delta by 1 / (v_k + τ²) (DerSimonian & Laird, Controlled Clinical Trials 1986). τ² is estimated from the deltas by their
method of moments, over all coordinates that share the same v. Malekmohammadi, Yu & Cao, ICML 2024, estimate the noise instead.
The number of records counts only through v_k, as in the literature: more records, less noise.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cotune.strategies.registry import Needs, weighting
from cotune.strategies.tensor_blocks import add_exactly, read_stacks
from cotune.strategies.types import Update

_MIN_RELATIVE_VARIANCE = (
    1e-3  # of the median variance; smaller stated variances count as this one, or one organization could take over the model
)


@dataclass(frozen=True)
class RandomEffects:
    """The estimate for one group of parameters.

    Attributes:
        between: τ², the variance between organizations per coordinate.
        weights: One per update, in their order; the largest is 1.
    """

    between: float
    weights: tuple[float, ...]


@weighting(
    "noise_aware",
    cite="DerSimonian & Laird, 1986; compare Malekmohammadi et al., ICML 2024, https://arxiv.org/abs/2406.03519",
    needs=Needs(sends=("noise",), by_parameter=True),
)
def noise_aware(updates: Sequence[Update]) -> list[dict[str, float]]:
    """Weight by 1 / (v_k + τ²), the variance of the privacy noise in Δ_k plus the variance between organizations.

    Each parameter has its own weights. An update that states no noise (no privacy) has v_k = 0. If that holds for all, the
    weights are equal: the plain mean.

    Args:
        updates: All contain the same parameters.

    Returns:
        For each update: parameter name -> weight.
    """
    weights: list[dict[str, float]] = [{} for _ in updates]
    for variances, names in _groups(updates).items():
        for found, weight in zip(weights, random_effects(updates, names, variances).weights, strict=True):
            found.update(dict.fromkeys(names, weight))
    return weights


def _groups(updates: Sequence[Update]) -> Mapping[tuple[float, ...], list[str]]:
    """Group parameters by the variances (v_1 … v_K) of their noise: the head may have another learning rate than the encoder."""
    groups: dict[tuple[float, ...], list[str]] = defaultdict(list)
    for name in updates[0].delta if updates else ():
        groups[tuple((u.noise_variance or {}).get(name, 0.0) for u in updates)].append(name)
    return groups


def random_effects(updates: Sequence[Update], names: Sequence[str], variances: Sequence[float]) -> RandomEffects:
    """Estimate τ² and compute the weights by the method of moments.

    With Q = Σ a_k ‖Δ_k − Δ̄_a‖² over d coordinates, E[Q] = d (Σ a_k v_k − Σ a_k² v_k / Σ a) + d τ² (Σ a − Σ a² / Σ a), which is
    solved for τ², and negative results become 0. a_k = 1/v_k gives DerSimonian & Laird's estimate,
    τ² = (Q − d(K−1)) / (d(Σ a − Σ a² / Σ a)); if some v_k is 0, a_k = 1 (Hedges & Olkin, 1985).

    Args:
        updates: K of them.
        names: Parameters whose noise has the same variances.
        variances: v_1 … v_K.
    """
    floor = _MIN_RELATIVE_VARIANCE * (statistics.median(variances) or max(variances))
    variances = [max(v, floor) for v in variances]
    least = min(variances)
    a = [least / v for v in variances] if least > 0 else [1.0] * len(updates)
    total = sum(a)
    squares = sum(x * x for x in a)
    within = (
        sum(x * v for x, v in zip(a, variances, strict=True)) - sum(x * x * v for x, v in zip(a, variances, strict=True)) / total
    )
    spread = total - squares / total
    between = max(0.0, (_scatter(updates, names, a) - within) / spread) if len(updates) > 1 and spread > 0 else 0.0
    sums = [v + between for v in variances]
    return RandomEffects(between, tuple(min(sums) / s if s else 1.0 for s in sums))


def _scatter(updates: Sequence[Update], names: Sequence[str], a: Sequence[float]) -> float:
    """Return Q / d in float64, computed a block of coordinates at a time."""
    weights = np.array(a)
    scatter: list[float] = []
    size = 0
    for name in names:
        for _, rows in read_stacks([update.delta for update in updates], name, np.float64):
            rows -= np.einsum("k,kj->j", weights, rows) / sum(a)
            scatter.append(float(np.einsum("k,kj,kj->", weights, rows, rows)))
            size += rows.shape[1]
    return add_exactly(scatter) / size if size else 0.0
