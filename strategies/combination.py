"""Weighting and fusion as one, fed by the round loop: updates in, one at a time, and the fused delta out.

How much memory a round takes is decided here: a weighting that looks at one update at a time needs the running sum only; one that
compares them (`noise_aware`) makes the server hold every delta of the round, 4 bytes per shared parameter and organisation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cotune.strategies.fusion import Fusion
from cotune.strategies.updates import Delta, Update

__all__ = ["Combination", "Held", "Streamed"]


class Combination(Protocol):
    """Takes the admitted updates of a round, then gives what moves the model."""

    def add(self, update: Update) -> None: ...

    def result(self) -> Delta: ...


class Streamed:
    """Each update is weighed by itself, added, and let go."""

    def __init__(self, weigh: Callable[[Update], float], fusion: Fusion) -> None:
        self._weigh, self._fusion = weigh, fusion

    def add(self, update: Update) -> None:
        self._fusion.add(update.delta, self._weigh(update))

    def result(self) -> Delta:
        return self._fusion.result()


class Held:
    """All updates are kept until the end, weighed against each other, and added in the order in which they came.

    Weights may differ between the parameters of one update: those with the same weight are added together. That asks for a fusion
    which treats every parameter by itself, as the weighted mean does.
    """

    def __init__(self, weigh: Callable[[Sequence[Update]], Sequence[Mapping[str, float]]], fusion: Fusion) -> None:
        self._weigh, self._fusion = weigh, fusion
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def result(self) -> Delta:
        for update, weights in zip(self._updates, self._weigh(self._updates), strict=True):
            for weight, names in _by_weight(weights).items():
                self._fusion.add({name: update.delta[name] for name in names}, weight)
        self._updates.clear()
        return self._fusion.result()


def _by_weight(weights: Mapping[str, float]) -> Mapping[float, list[str]]:
    groups: dict[float, list[str]] = defaultdict(list)
    for name, weight in weights.items():
        groups[weight].append(name)
    return groups
