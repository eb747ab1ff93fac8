"""The total that an organization allows over all runs, in every collection that a run's charges concern."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cotune.privacy.accounting import Steps
from cotune.privacy.charges import History
from cotune.privacy.filters import epsilon_filter, epsilon_over_runs

_TOLERANCE = 1e-3  # relative, of a noise multiplier


@dataclass(frozen=True)
class Total:
    """ε at δ for a run and all others that count with it.

    histories: of every collection that the run's charges concern, with those made so far; none: nothing was ever charged.
    """

    plan_id: str
    epsilon: float
    delta: float
    histories: Sequence[History] = field(default=())

    @property
    def others(self) -> bool:
        """Whether another run was charged there."""
        return any(set(history.runs) - {self.plan_id} for history in self.histories)

    def after(self, steps: Sequence[Steps]) -> float:
        """ε that the run's further steps would bring the most burdened of these collections to."""
        return max(
            epsilon_over_runs(history.with_steps(self.plan_id, steps), self.epsilon, min(self.delta, history.delta))
            for history in self.histories or [History("", {})]
        )

    def spent(self) -> float:
        """ε so far, as it counts for this run: by the filter where there was another run before."""
        return max((self._spent(history) for history in self.histories), default=0.0)

    def _spent(self, history: History) -> float:
        delta = min(self.delta, history.delta)
        if set(history.runs) <= {self.plan_id}:
            return epsilon_over_runs(history.runs, self.epsilon, delta)
        return epsilon_filter([s for steps in history.runs.values() for s in steps], self.epsilon, delta / 2)

    def smallest_noise(self, steps_at: Callable[[float], Sequence[Steps]], low: float, high: float) -> float:
        """The smallest σ between two with which the steps fit into the total, to one part in a thousand; infinite: none does."""
        if self.after(steps_at(high)) > self.epsilon:
            return math.inf
        while high / low > 1 + _TOLERANCE:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.after(steps_at(middle)) <= self.epsilon else (middle, high)
        return high
