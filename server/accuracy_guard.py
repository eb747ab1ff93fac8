"""A round that makes the model much worse on the coordinator's test set is not applied: the state before it stays.

It is kept in the history as not applied, with what stood out: whoever is shown may be hostile, or unlike the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cotune.models.tasks import Metrics
from cotune.strategies.combination import Combination, UpdateLook, WeightedFusion

__all__ = ["fell", "looks_of", "seen", "suspects"]

_DIGITS = 6


def fell(before: Mapping[str, float] | None, after: Metrics | None, most: float) -> bool:
    """Whether the accuracy has fallen by more than `most` (a fraction of the test set)."""
    return before is not None and after is not None and before["accuracy"] - after.accuracy > most + 1e-9


def looks_of(combination: Combination) -> dict[str, UpdateLook]:
    """Of the round's updates; nothing of them under client-level privacy, where a whole organization is protected."""
    return combination.looks() if isinstance(combination, WeightedFusion) else {}


def seen(looks: Mapping[str, UpdateLook], order: Sequence[str]) -> dict[str, Any]:
    """Weights and norms as they stand in the history."""
    names = [name for name in order if name in looks]
    return {
        "weights": {name: round(looks[name].share, _DIGITS) for name in names},
        "norms": {name: float(f"{looks[name].norm:.4g}") for name in names},
    }


def suspects(looks: Mapping[str, UpdateLook]) -> list[dict[str, Any]]:
    """Who stood out most, the first first; fewer than half of them, but one at least where there are three.

    By the distance to the middle of the updates; where the server has not held them, by weight times norm, as that moves a mean.
    """
    if len(looks) < 3:
        return []
    length = statistics.median(look.norm for look in looks.values())

    def strange(name: str) -> float:
        look = looks[name]
        return look.distance if look.distance is not None else look.share * max(look.norm, length)

    found = sorted(looks, key=lambda name: (-strange(name), name))[: (len(looks) - 1) // 2]
    return [
        {
            "organisation": name,
            "norm": float(f"{looks[name].norm:.4g}"),
            "median_norm": float(f"{length:.4g}"),
            "cosine": None if looks[name].cosine is None else round(looks[name].cosine or 0.0, 3),
            "weight": round(looks[name].share, _DIGITS),
        }
        for name in found
    ]
