"""A round that makes the model much worse on the coordinator's records is not applied: the state before it stays.

The coordinator's validation records decide where it has some. Otherwise its test set decides in a real run: figures on that set
are then those of a model that was chosen by it, if by coarse steps only. In a simulated run the test set never decides: it holds
records of the simulated organizations, it is small, and the reported accuracy would be one that was selected for.

A round that is not applied is kept in the history, with the updates that stood out: such an organization may be hostile, or only
unlike the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from cotune.data.metrics.metrics import Metrics
from cotune.models.trainable import State
from cotune.reporting.documents.rounds import MetricsEntry, SuspectEntry
from cotune.strategies.aggregator import Aggregator, Combination, UpdateSummary

_DIGITS = 6
_ROUNDING = 1e-9


class AccuracyGuard:
    """Decides whether a round is applied."""

    def __init__(self, max_drop: float, validate: Callable[[State], float] | None, *, by_test_set: bool) -> None:
        """Create the guard of a run.

        Args:
            max_drop: Fall of the accuracy that is still accepted, as a share of the records that decide; from 1 on every fall is.
            validate: A state's accuracy on the coordinator's validation records, 0 to 1; None where it has none.
            by_test_set: Whether the test set judges in their place.
        """
        self._max_drop = max_drop
        self._validate = validate
        self.active = max_drop < 1 and (validate is not None or by_test_set)

    def accepts(self, before: State, metrics_before: MetricsEntry | None, after: State, metrics: Metrics | None) -> bool:
        """Return whether the accuracy has not fallen by more than is accepted; true where no records decide.

        Args:
            before: The model that the round began with, as it is served.
            metrics_before: Its metrics on the test set.
            after: The model that the round would give, as it is served.
            metrics: Its metrics on the test set.
        """
        if not self.active:
            return True
        if self._validate is not None:
            return self._validate(before) - self._validate(after) <= self._max_drop + _ROUNDING
        if metrics_before is None or metrics is None:
            return True
        return metrics_before.score - metrics.score <= self._max_drop + _ROUNDING


def read_update_looks(combination: Combination) -> dict[str, UpdateSummary]:
    """Return how the updates of a round look; nothing under client-level privacy, where a whole organization is protected."""
    return combination.summarize_updates() if isinstance(combination, Aggregator) else {}


def rounded_weights(looks: Mapping[str, UpdateSummary], order: Sequence[str]) -> dict[str, float]:
    """Return organization -> its share of the round as it stands in the history."""
    return {name: round(looks[name].share, _DIGITS) for name in order if name in looks}


def rounded_norms(looks: Mapping[str, UpdateSummary], order: Sequence[str]) -> dict[str, float]:
    """Return organization -> norm of its update as it stands in the history."""
    return {name: _rounded(looks[name].norm) for name in order if name in looks}


def find_suspects(looks: Mapping[str, UpdateSummary]) -> list[SuspectEntry]:
    """Return the updates that stood out most, the first first: fewer than half of them, but one at least where there are three.

    They are ordered by their distance to the middle of the updates; where the server has not held them, by weight times norm, as
    that moves a mean.
    """
    if len(looks) < 3:
        return []
    length = statistics.median(look.norm for look in looks.values())

    def strangeness(name: str) -> float:
        look = looks[name]
        return look.distance if look.distance is not None else look.share * max(look.norm, length)

    found = sorted(looks, key=lambda name: (-strangeness(name), name))[: (len(looks) - 1) // 2]
    return [_suspect(name, looks[name], length) for name in found]


def _suspect(name: str, look: UpdateSummary, median_norm: float) -> SuspectEntry:
    return SuspectEntry(
        organization=name,
        norm=_rounded(look.norm),
        median_norm=_rounded(median_norm),
        cosine=None if look.cosine is None else round(look.cosine, 3),
        weight=round(look.share, _DIGITS),
    )


def _rounded(norm: float) -> float:
    return float(f"{norm:.4g}")
