"""How much each update counts, before normalisation: w_k of p_k = w_k / Σ w."""

from __future__ import annotations

from collections.abc import Callable

from cotune.strategies.updates import Update

__all__ = ["WEIGHTINGS", "examples", "uniform"]


def examples(update: Update) -> float:
    """n_k, the number of records the organisation declares (McMahan et al., AISTATS 2017, algorithm 1)."""
    return float(update.examples)


def uniform(update: Update) -> float:
    """Every organisation counts the same."""
    return 1.0


WEIGHTINGS: dict[str, Callable[[Update], float]] = {"examples": examples, "uniform": uniform}
