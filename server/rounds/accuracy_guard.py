"""Discard a round that makes the model much worse on the coordinator's records, and keep the state before it.

The accuracy is measured on the coordinator's validation records if it has some, otherwise in a real run on its test set; figures
on that set are then slightly biased, as it helped to select the model. In a simulated run the test set never decides: it contains
records of the simulated organizations, it is small, and the reported accuracy would be one that was selected for.

A discarded round stays in the history, with the updates that deviated most. Their organizations may be hostile, or only unlike
the others.
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
            max_drop: Largest accepted fall of the accuracy, as a fraction of the records; with 1 or more, any fall is accepted.
            validate: State -> accuracy on the coordinator's validation records, 0 to 1; None if it has none.
            by_test_set: Whether the accuracy on the test set is used if there are no validation records.
        """
        self._max_drop = max_drop
        self._validate = validate
        self.active = max_drop < 1 and (validate is not None or by_test_set)

    def accepts(self, before: State, metrics_before: MetricsEntry | None, after: State, metrics: Metrics | None) -> bool:
        """Return whether the accuracy fell by no more than `max_drop`; true if there are no records to measure it on.

        Args:
            before: The model at the start of the round, as organizations received it.
            metrics_before: Its metrics on the test set.
            after: The model after the round, as organizations would receive it.
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
    """Return the summaries of a round's updates; none under client-level privacy, which protects what an organization sends."""
    return combination.summarize_updates() if isinstance(combination, Aggregator) else {}


def rounded_weights(looks: Mapping[str, UpdateSummary], order: Sequence[str]) -> dict[str, float]:
    """Return organization -> its share of the round's weight, rounded for the history."""
    return {name: round(looks[name].share, _DIGITS) for name in order if name in looks}


def rounded_norms(looks: Mapping[str, UpdateSummary], order: Sequence[str]) -> dict[str, float]:
    """Return organization -> norm of its update, rounded for the history."""
    return {name: _rounded(looks[name].norm) for name in order if name in looks}


def find_suspects(looks: Mapping[str, UpdateSummary]) -> list[SuspectEntry]:
    """Return the updates that deviated most, in descending order: fewer than half, but at least one of three or more.

    They are ordered by their distance to the coordinate-wise median; if the server did not store the updates, by weight times
    norm, which is how far an update moves a mean.
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
