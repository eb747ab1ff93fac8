"""Aggregate the updates of one round: the round loop adds them one at a time and takes the fused delta at the end.

The components decide how much memory a round takes. A weighting that looks at one update at a time with a fusion that needs one
sum keeps running sums only, 8 bytes per shared parameter. Components that compare updates need every delta of the round, 4 bytes
per shared parameter and organization: on disk if the caller names a folder (see `update_store`), else in memory.

This module also builds the components of a strategy from its table. It is separate from the table itself (`config`), which is
pure data and does not import PyTorch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from cotune.errors import RunError
from cotune.strategies.client_terms.base import ClientTerm
from cotune.strategies.config import StrategyConfig
from cotune.strategies.order_statistics import sort_rows
from cotune.strategies.registry import ComponentInfo, Visibility
from cotune.strategies.server_optimizers.base import ServerOptimizer
from cotune.strategies.sums import Contribution, add_weighted, norm, total, weighted
from cotune.strategies.tensor_blocks import is_finite, read_stacks, shape_of
from cotune.strategies.types import Aggregate, Delta, RoundContext, Update, WeightedUpdate, find_not_finite
from cotune.strategies.update_store import HeldUpdates


class Combination(Protocol):
    """Combines the accepted updates of a round into what moves the model."""

    def add(self, update: Update) -> None:
        """Add one accepted update."""

    def result(self) -> Delta | Aggregate:
        """Return the combination of all updates that were added."""


@dataclass(frozen=True)
class UpdateSummary:
    """One organization's update in figures, for the run's report.

    Attributes:
        share: Its fraction of the round's total weight.
        norm: L2 norm of the delta as received.
        distance: L2 distance to the coordinate-wise median of the updates; None if the server did not store the updates, or if
            there were fewer than three.
        cosine: Cosine similarity to that median; None in the same cases.
    """

    share: float
    norm: float
    distance: float | None = None
    cosine: float | None = None


def _apart(held: Sequence[Update]) -> dict[str, tuple[float, float]]:
    """Return organization -> (distance, cosine) between its delta and the coordinate-wise (lower) median.

    Only parameters that every organization sent, in the same shape, count. Empty for fewer than three updates.
    """
    if len(held) < 3:
        return {}
    deltas = [update.delta for update in held]
    far, inner, own = np.zeros((3, len(held)))
    length = 0.0
    for name in deltas[0]:
        if any(name not in each or shape_of(each, name) != shape_of(deltas[0], name) for each in deltas):
            continue
        for _, rows in read_stacks(deltas, name, np.float64):
            middle = sort_rows(rows.copy())[(len(rows) - 1) // 2]
            length += float(np.einsum("j,j->", middle, middle))
            inner += np.einsum("ij,j->i", rows, middle)
            own += np.einsum("ij,ij->i", rows, rows)
            rows -= middle
            far += np.einsum("ij,ij->i", rows, rows)
    both = own * length
    cosines = np.where(both > 0, inner / np.sqrt(np.where(both > 0, both, 1.0)), 0.0)
    return {u.organization: (math.sqrt(d), float(cosine)) for u, d, cosine in zip(held, far, cosines, strict=True)}


class Aggregator:
    """One round of a weighting and a fusion."""

    def __init__(
        self,
        weighting: tuple[ComponentInfo, Mapping[str, Any]],
        fusion: tuple[ComponentInfo, Mapping[str, Any]],
        context: RoundContext,
        folder: Path | None = None,
    ) -> None:
        """Create an aggregator without updates.

        Args:
            weighting: The component and its parameters.
            fusion: The component and its parameters.
            context: What the components may know of the round.
            folder: Where large deltas are stored if the components compare updates; None keeps them in memory.
        """
        self._weighting = weighting
        self._fusion = fusion
        self._context = context
        self._weigh = _bound(*weighting, context)
        self._fuse = _bound(*fusion, context)
        self._in_sums = inspect.isgeneratorfunction(fusion[0].build)
        self._streams = self._in_sums and fusion[0].needs.visibility == Visibility.SUM and not weighting[0].sees_all
        self._held = HeldUpdates(folder)
        self._lengths: list[float] = []  # norms of the stored updates
        self._sums: dict[str, Tensor] = {}
        self._passes = self._fuse() if self._in_sums else None
        self._contribute: Contribution | None = next(self._passes) if self._passes is not None else None
        self._count = 0
        self._weights = 0.0
        self._squares = 0.0
        self._seen: dict[str, tuple[float, float]] = {}  # organization -> the weight and the norm of its update
        self._given: Mapping[str, float] = {}
        self._places: Mapping[str, tuple[float, float]] = {}

    def add(self, update: Update, staleness: int = 0) -> None:
        """Add an update to the round.

        The weight of an update that is s rounds late is multiplied by (1 + s)^(-½): Xie et al., 2019,
        https://arxiv.org/abs/1903.03934, section 5.2; Nguyen et al., AISTATS 2022, https://arxiv.org/abs/2106.06639, section 5.

        Args:
            update: Its delta may lie in memory or on disk.
            staleness: s, in rounds; 0 for an update of this round.

        Raises:
            RunError: If the delta or the weight is not finite, or if a late update meets components that compare updates.
        """
        if self._streams:
            self._count += 1
            self._stream(update, _discounted(self._weigh(update), staleness))
        elif staleness:
            raise RunError(
                f"the update of {update.organization[:80]} is late: expected a rule that adds updates up", code="run.update_late"
            )
        else:
            length = norm(update.delta)
            self._check_finite(update, length)
            self._count += 1
            self._held.add(update)
            self._lengths.append(length)

    def _stream(self, update: Update, weight: Any) -> None:
        """Add an update to the running sums; a plain weighted sum is added, measured and checked in one pass."""
        self._check_weight(update, weight)
        weighed = WeightedUpdate(update, weight, self._context.state)
        if self._contribute is weighted:
            length = math.sqrt(add_weighted(self._sums, weighed))
            self._check_finite(update, length)
        else:
            length = norm(update.delta)
            self._check_finite(update, length)
            self._add_up(weighed)
        self._note(weighed, length)

    def _check_weight(self, update: Update, weight: Any) -> None:
        values = weight.values() if isinstance(weight, Mapping) else (weight,)
        if not all(isinstance(w, int | float) and 0 <= w < math.inf for w in values):
            raise RunError(
                f'the weighting "{self._weighting[0].name}" gave {update.organization[:80]} the weight {weight!r:.60}: expected a'
                " finite number, 0 or more",
                code="run.invalid_weight",
            )

    def _check_finite(self, update: Update, length: float) -> None:
        if not math.isfinite(length) and find_not_finite(update.delta):
            raise RunError(
                f"the update of {update.organization[:80]} is not finite: expected finite values", code="run.update_not_finite"
            )

    def _note(self, weighed: WeightedUpdate, length: float) -> None:
        """Record the weight and the norm of an update for the summary."""
        values = list(weighed.weight.values()) if isinstance(weighed.weight, Mapping) else [weighed.weight]
        mean = sum(values) / max(1, len(values))
        self._seen[weighed.update.organization] = (mean, length)
        self._weights += mean
        self._squares += mean * length**2

    def _add_up(self, weighed: WeightedUpdate) -> None:
        assert self._contribute is not None
        if self._contribute is weighted:
            add_weighted(self._sums, weighed)
        else:
            total(self._sums, self._contribute(weighed))

    def result(self) -> Aggregate:
        """Return the fused delta and its statistics; an empty aggregate if the round has no updates.

        Raises:
            RunError: If the fusion needs more updates than there are, if all weights are 0, or if the fusion's result does not
                fit the model or is not finite.
        """
        if not self._count:
            return Aggregate({}, 0)  # no organization was asked in this round
        info, parameters = self._fusion
        least = info.min_updates(**parameters)
        if self._count < least:
            raise RunError(
                f'the fusion "{info.name}" needs {least} updates, and the round has {self._count}: ask more organizations, raise'
                " server.quorum, or choose another fusion",
                code="run.too_few_updates",
            )
        weights = [] if self._streams else self._weigh_all()
        if not self._weights > 0:
            raise RunError(
                f'the weighting "{self._weighting[0].name}" gave every update the weight 0: expected one above',
                code="run.no_weight",
            )
        found = self._passed(weights) if self._passes is not None else self._fuse(self._weighed(weights))
        fused = found if isinstance(found, Aggregate) else Aggregate(found)
        self._given = fused.weights
        self._places = _apart(self._held.updates)
        self._held.clear()
        _check(info.name, fused.delta, self._context.state)
        return Aggregate(fused.delta, self._count, self._squares / self._weights, fused.memory)

    def summarize_updates(self) -> dict[str, UpdateSummary]:
        """Return organization -> summary of its update; call it after `result`."""
        total_weight = sum(weight for weight, _ in self._seen.values())
        shares = self._given or {name: weight / total_weight for name, (weight, _) in self._seen.items() if total_weight > 0}
        return {
            name: UpdateSummary(shares.get(name, 0.0), length, *self._places.get(name, (None, None)))
            for name, (_, length) in self._seen.items()
        }

    def _weigh_all(self) -> list[Any]:
        held = self._held.updates
        weights = list(self._weigh(held) if self._weighting[0].sees_all else map(self._weigh, held))
        for update, weight, length in zip(held, weights, self._lengths, strict=True):
            self._check_weight(update, weight)
            self._note(WeightedUpdate(update, weight), length)
        return weights

    def _weighed(self, weights: Sequence[Any]) -> list[WeightedUpdate]:
        state = self._context.state
        return [WeightedUpdate(update, weight, state) for update, weight in zip(self._held.updates, weights, strict=True)]

    def _passed(self, weights: Sequence[Any]) -> Delta | Aggregate:
        """Run the passes of a generator rule over the updates; for streamed updates the single sum is already complete."""
        assert self._passes is not None
        try:
            while True:
                for number, weight in enumerate(weights):  # new objects each pass, which frees what the rule cached in them
                    self._add_up(WeightedUpdate(self._held.updates[number], weight, self._context.state))
                sums = self._sums
                self._sums = {}
                self._contribute = self._passes.send(sums)
                if self._streams:
                    raise RunError(
                        f'the fusion "{self._fusion[0].name}" asks for a second pass: expected needs.visibility to say so',
                        code="run.undeclared_pass",
                    )
        except StopIteration as end:
            result: Delta | Aggregate = end.value
            return result


def _discounted(weight: Any, staleness: int) -> Any:
    if not staleness:
        return weight
    factor = (1 + staleness) ** -0.5
    return {name: w * factor for name, w in weight.items()} if isinstance(weight, Mapping) else weight * factor


def _bound(info: ComponentInfo, parameters: Mapping[str, Any], context: RoundContext) -> Callable[..., Any]:
    return partial(info.build, **parameters, **({"context": context} if info.needs_context else {}))


def _check(name: str, delta: Delta, state: Mapping[str, Tensor]) -> None:
    for key, tensor in delta.items():
        if state and key not in state:
            raise RunError(
                f'the fusion "{name}" gave a delta of {key[:80]}, which the model has not: expected its own parameters',
                code="run.invalid_aggregate",
            )
        if key in state and state[key].shape != tensor.shape:
            raise RunError(
                f'the fusion "{name}" gave {key} {tuple(tensor.shape)}: expected {tuple(state[key].shape)}, as in the model',
                code="run.invalid_aggregate",
            )
        if not is_finite(delta, key):
            raise RunError(
                f'the fusion "{name}" gave values for {key} that are not finite: expected a finite delta',
                code="run.invalid_aggregate",
            )


def build_aggregator(strategy: StrategyConfig, context: RoundContext, folder: Path | None = None) -> Aggregator:
    """Build the aggregator of one round.

    Args:
        strategy: Its components in files are executed.
        context: What the components may know of the round.
        folder: See `Aggregator`.

    Raises:
        PlanError: If a component cannot be loaded.
    """
    weighting = (strategy.weighting.info("weighting"), strategy.weighting.parameters)
    return Aggregator(weighting, (strategy.fusion.info("fusion"), strategy.fusion.parameters), context, folder)


def build_server_optimizer(strategy: StrategyConfig) -> ServerOptimizer:
    """Build the server optimizer that the strategy names."""
    part = strategy.server_optimizer
    built: ServerOptimizer = part.info("server_optimizer").build(**part.parameters)
    return built


def build_client_term(strategy: StrategyConfig) -> ClientTerm:
    """Build the strategy's client term; without one, the base class, which adds nothing to gradients."""
    part = strategy.client_term
    built: ClientTerm = ClientTerm() if part is None else part.info("client_term").build(**part.parameters)
    return built
