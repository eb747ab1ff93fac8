"""How much each update counts, before normalisation: w_k of p_k = w_k / Σ w."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cotune.strategies.noise_aware import noise_aware
from cotune.strategies.updates import Update

__all__ = ["JOINT_WEIGHTINGS", "WEIGHTINGS", "examples", "uniform"]


def examples(update: Update) -> float:
    """n_k, the number of records the organisation declares (McMahan et al., AISTATS 2017, algorithm 1)."""
    return float(update.examples)


def uniform(update: Update) -> float:
    """Every organisation counts the same."""
    return 1.0


WEIGHTINGS: dict[str, Callable[[Update], float]] = {"examples": examples, "uniform": uniform}

# Those that must see all updates before they know any weight; they may weigh each parameter differently.
JOINT_WEIGHTINGS: dict[str, Callable[[Sequence[Update]], Sequence[Mapping[str, float]]]] = {"noise_aware": noise_aware}
