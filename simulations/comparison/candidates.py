"""The plans that a private selection chooses from: checked to be alike where the promise needs it, and what choosing costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cotune.errors import PlanError
from cotune.privacy.accounting.composition import epsilon
from cotune.privacy.accounting.private_selection import selection_epsilon
from cotune.privacy.config import RecordPrivacy
from cotune.simulations.comparison.grid import GridPoint
from cotune.simulations.joint_privacy_loss import get_steps_by_organization, max_divergences


@dataclass(frozen=True)
class Candidates:
    """Plans with the same records and the same unit.

    Attributes:
        cells: Of each plan.
        expected_runs: Mean of the number of runs.
        curve: Rényi order -> divergence of one run, the largest over plans and organizations.
        delta: The smallest of any organization in any plan.
    """

    cells: tuple[GridPoint, ...]
    expected_runs: float
    curve: Mapping[float, float]
    delta: float

    @classmethod
    def of(cls, cells: Sequence[GridPoint], expected_runs: float) -> Self:
        """Check the plans. Raises PlanError for those among which nothing can be chosen privately, PrivacyError for a mean
        below 1.
        """
        for cell in cells:
            _check_private(cell)
            _check_alike(cells[0], cell)
        delta = min(delta for cell in cells for delta in cell.promise.deltas)
        curve = _highest(max_divergences(cell.promise.charges) for cell in cells)
        selection_epsilon(curve, expected_runs, delta)
        return cls(tuple(cells), expected_runs, curve, delta)

    @property
    def digest(self) -> str:
        """SHA-256 over the plans, the records and the mean."""
        parts = [repr(float(self.expected_runs)), *(f"{cell.plan_id} {cell.data}" for cell in self.cells)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def unit(self) -> str:
        """Whom the promise is made to."""
        return _unit(self.cells[0])[0]

    @property
    def epsilon_one_run(self) -> float:
        """ε of one run of the costliest plan, without a choice."""
        return max(epsilon(charges, self.delta) for cell in self.cells for charges in cell.promise.charges)

    def epsilon_selected(self, runs: Iterable[Path] = ()) -> float:
        """Return ε of what is released.

        Args:
            runs: Folders of runs that were played. What was charged there counts where interruptions made it more than planned.
        """
        curve = _highest([self.curve, *(max_divergences(get_steps_by_organization(run)) for run in runs)])
        return selection_epsilon(curve, self.expected_runs, self.delta)


def _highest(curves: Iterable[Mapping[float, float]]) -> dict[float, float]:
    """At every order the largest."""
    known = list(curves)
    return {order: max(curve[order] for curve in known) for order in known[0]}


def _check_private(cell: GridPoint) -> None:
    """Raise PlanError for a plan whose output has no ε of its own, or no single model."""
    plan = cell.plan
    problems = {
        "has no record-level privacy, so that no ε can cover a choice": not isinstance(plan.privacy, RecordPrivacy),
        "has client_privacy, whose ε a choice would raise too, which is not accounted": plan.client_privacy is not None,
        "trains baselines, which would not be released": bool(plan.simulation.baselines),
        "keeps a part of the model with each organization, so that no common one could be released": plan.keeps_personal,
    }
    for problem, found in problems.items():
        if found:
            raise PlanError(
                f"{cell.combination}: the plan {problem}: expected another plan, or no private selection",
                code="plan.not_selectable",
            )


def _check_alike(first: GridPoint, cell: GridPoint) -> None:
    """Raise PlanError where a record that tests one plan could train another, or the promises are made to different units."""
    if (cell.data, cell.promise.held_out) != (first.data, first.promise.held_out):
        raise PlanError(
            f"{first.combination} and {cell.combination} are tested on different records, so that the score of one would depend"
            " on records that train the other: expected keys that leave the records and the test set as they are",
            code="plan.not_selectable",
        )
    if _unit(cell) != _unit(first):
        raise PlanError(
            f"{first.combination} and {cell.combination} make their promises to different units: expected the same privacy.unit"
            " and privacy.max_records",
            code="plan.not_selectable",
        )


def _unit(cell: GridPoint) -> tuple[str, int | None]:
    privacy = cell.plan.privacy
    assert isinstance(privacy, RecordPrivacy), "checked before"
    return privacy.unit, privacy.max_records
