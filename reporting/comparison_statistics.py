"""Statistics of a grid of runs: means over seeds with their uncertainty, and paired differences from a baseline.

A seed determines the initial model, the partition of records, the selection of organizations and the order of batches. Two
strategies under the same seed differ in nothing else, so that differences are computed seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scipy import stats

from cotune.reporting.measures import Measure, get_measures

CONFIDENCE = 0.95
Settings = tuple[tuple[str, str], ...]  # (key, value) of every variation, in the order of the variations
_SHORT = {  # as the options of `cotune simulate`
    "data": "data.source",
    "text": "data.text",
    "label": "data.label",
    "model": "model.base",
    "clients": "simulation.clients",
    "partition": "simulation.partition",
}
_NO_SPREAD = 1e-12  # differences this close to each other are one number with rounding


@dataclass(frozen=True)
class Measured:
    """One cell of the grid. A failed one lacks results, which are None.

    Attributes:
        settings: (key, value) of each variation.
        seed: Of the run.
        plan_id: Of the run.
        status: finished, stopped or failed.
        reason: Why it failed or stopped.
        metrics: Of the last model, on the common test set.
        worst: Worst value of the main metric over the organizations' own records.
        spread: Spread of the main metric over the organizations' own records.
        gain: Mean gain of joining on the organizations' own held-out records, compared with alone without privacy; None if alone
            was not trained.
        answers: Number of organizations for which joining is worth it, is not, and is too close to tell; None likewise.
        bytes_up: Bytes of updates.
        bytes_down: Bytes of requests.
        seconds: Duration.
        epsilon: Largest ε that an organization spent.
        deltas: δ of each organization.
        curve: (round, main metric on the common test set).
        folder: Of the run.
    """

    settings: Settings
    seed: int
    plan_id: str
    status: str  # finished, stopped or failed
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    worst: float | None = None
    spread: float | None = None
    gain: float | None = None
    answers: tuple[int, int, int] | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    seconds: float | None = None
    epsilon: float | None = None
    deltas: tuple[float, ...] = ()  # of the organizations
    curve: tuple[tuple[int, float], ...] = ()  # (round, the figure that decides on the common test set)
    folder: str = ""

    def score(self, measure: Measure) -> float | None:
        """Return a figure on the common test set; None where nothing was measured."""
        return self.metrics.get(measure.key)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds, and half the width of its Student t interval; None for fewer than two seeds."""

    mean: float
    half: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """The difference from the baseline over the seeds that both have finished.

    Attributes:
        estimate: Of the difference.
        p: p-value of the paired t-test.
        holm: p-value after Holm's correction.
    """

    estimate: Estimate
    p: float | None
    holm: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below the significance level."""
        return self.holm is not None and self.holm < 1 - CONFIDENCE


@dataclass(frozen=True)
class Combination:
    """One row: a value of the compared key within a facet, over its seeds. None: nothing was measured, or it is the baseline.

    score: the figure that decides, on the common test set.
    """

    value: str
    facet: Settings
    cells: tuple[Measured, ...]
    score: Estimate | None
    difference: Difference | None
    worst: Estimate | None
    spread: Estimate | None
    gain: Estimate | None
    answers: tuple[int, int, int] | None  # over all seeds
    bytes_up: float | None
    bytes_down: float | None
    seconds: float | None
    epsilon: float | None  # the largest that any organization spent under any seed

    @property
    def failed(self) -> tuple[Measured, ...]:
        """The cells that failed."""
        return tuple(cell for cell in self.cells if cell.status == "failed")


@dataclass(frozen=True)
class Variation:
    """A key of the plan and the values that it takes, as in an override."""

    key: str
    values: tuple[str, ...]

    @property
    def path(self) -> str:
        """The key in the plan, of which `key` may be a short name."""
        return _SHORT.get(self.key, self.key)


@dataclass(frozen=True)
class Comparison:
    """The results: cells in the order of the grid, and their rows. `cells[i].folder` is relative to `folder`."""

    folder: Path
    plan: str
    variations: tuple[Variation, ...]
    baseline: str
    seeds: tuple[int, ...]
    private: bool
    cells: tuple[Measured, ...]
    rows: tuple[Combination, ...]
    measure: Measure
    epsilon_together: float | None = None  # of all runs, for any single record; None where no ε covers them all
    delta_together: float | None = None
    notes: tuple[str, ...] = ()  # about the records, such as how many are left out and why

    @property
    def failed(self) -> tuple[Measured, ...]:
        """The cells that failed."""
        return tuple(cell for cell in self.cells if cell.status == "failed")


def deciding_measure(cells: Iterable[Measured]) -> Measure:
    """Return the figure by which cells are compared: that of the task of those that were measured."""
    return get_measures(next((cell.metrics for cell in cells if cell.metrics), None))[0]


def combine(cells: Sequence[Measured], baseline: str) -> tuple[Combination, ...]:
    """The rows, facet by facet, in the order of the grid. The first key is the compared one; `baseline` is one of its values."""
    measure = deciding_measure(cells)
    groups: dict[tuple[Settings, str], list[Measured]] = {}
    for cell in cells:
        groups.setdefault((cell.settings[1:], cell.settings[0][1]), []).append(cell)
    rows = [_row(value, facet, group, groups[facet, baseline], baseline, measure) for (facet, value), group in groups.items()]
    facets = dict.fromkeys(row.facet for row in rows)
    return tuple(row for facet in facets for row in _corrected([row for row in rows if row.facet == facet]))


def _row(
    value: str, facet: Settings, cells: Sequence[Measured], reference: Sequence[Measured], baseline: str, measure: Measure
) -> Combination:
    own = difference(_scores(cells, measure), _scores(reference, measure)) if value != baseline else None
    spent = [cell.epsilon for cell in cells if cell.epsilon is not None]
    return Combination(
        value=value,
        facet=facet,
        cells=tuple(sorted(cells, key=lambda cell: cell.seed)),
        score=estimate(_known(cell.score(measure) for cell in cells)),
        difference=own,
        worst=estimate(_known(cell.worst for cell in cells)),
        spread=estimate(_known(cell.spread for cell in cells)),
        gain=estimate(_known(cell.gain for cell in cells)),
        answers=_counted([cell.answers for cell in cells if cell.answers is not None]),
        bytes_up=_mean(cell.bytes_up for cell in cells),
        bytes_down=_mean(cell.bytes_down for cell in cells),
        seconds=_mean(cell.seconds for cell in cells),
        epsilon=max(spent, default=None),
    )


def _scores(cells: Iterable[Measured], measure: Measure) -> dict[int, float]:
    scores = ((cell.seed, cell.score(measure)) for cell in cells)
    return {seed: score for seed, score in scores if score is not None}


def _counted(answers: Sequence[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    return (sum(a[0] for a in answers), sum(a[1] for a in answers), sum(a[2] for a in answers)) if answers else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return math.fsum(known) / len(known) if known else None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean ± t(0.975; n−1)·s/√n; None of nothing.

    >>> estimate([0.75, 0.75])
    Estimate(mean=0.75, half=0.0, count=2)
    """
    if not values:
        return None
    count = len(values)
    mean = math.fsum(values) / len(values)
    if count < 2:
        return Estimate(mean, None, count)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Seed by seed, over the seeds that both have; None where there is none.

    p is that of the two-sided paired t-test: 1 where nothing differs at all, None for fewer than two seeds or where all differ by
    the same non-zero amount, which leaves the test nothing to estimate an error from.
    """
    pairs = [(values[seed], baseline[seed]) for seed in sorted(values.keys() & baseline.keys())]
    apart = [one - other for one, other in pairs]
    found = estimate(apart)
    if found is None:
        return None
    if len(pairs) < 2:
        return Difference(found, None)
    if max(apart) - min(apart) < _NO_SPREAD:
        return Difference(found, 1.0 if abs(found.mean) < _NO_SPREAD else None)
    return Difference(found, float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number, step down (Holm, Scand. J. Statist. 6, 1979); None stays None and does not count.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[i] = least
    return corrected


def _corrected(rows: Sequence[Combination]) -> list[Combination]:
    """The rows of one facet, with the p-values corrected for their number."""
    values = holm([row.difference.p if row.difference else None for row in rows])
    return [
        replace(row, difference=replace(row.difference, holm=p)) if row.difference else row
        for row, p in zip(rows, values, strict=True)
    ]
