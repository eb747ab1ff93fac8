"""Validate updates before they enter the model. The server trusts no organization and rejects what deviates from the plan."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from cotune.ensembles.public_inputs import find_extreme_score
from cotune.models.adapters.adapter import Adapter
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES, PublicConfig
from cotune.plan.trained_parameters import heads_of
from cotune.plan.update_norm import bound_update_norm
from cotune.plan.wire import Codec
from cotune.printable import printable
from cotune.privacy.config import RecordPrivacy
from cotune.protocol.codecs import packed_bytes
from cotune.server.rounds.run_environment import ExampleBounds
from cotune.strategies.sums import norm
from cotune.strategies.tensor_blocks import is_finite
from cotune.strategies.types import MAX_VALUE, RoundContext, Update, find_extreme, find_not_finite

_ARRAY_HEAD = 1024  # bytes of an array beside its values and its name, with a margin
_EPSILON_ROUNDING = 0.0100001  # ε is reported with two decimals, rounded up
_MAX_LOSS = 1e6  # nats; no model that trains has a larger loss, and powers of larger ones would overflow
_MAX_CHANGE = 2 * MAX_VALUE  # of a parameter; with a larger change it exceeds MAX_VALUE before or after
_MAX_REASON_LENGTH = 500

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ValidationResult:
    """The result of validating an update.

    Attributes:
        reason: What is wrong with it; "" if it is valid.
    """

    reason: str = ""

    @property
    def is_valid(self) -> bool:
        """Whether the update may enter the model."""
        return not self.reason


def _no_limit(examples: int) -> float:
    return math.inf


@dataclass(frozen=True)
class UpdateSpec:
    """The requirements on the updates of one round.

    Attributes:
        round: The round.
        shapes: Name -> a tensor of that shape, of the parameters that the round shares; the device may be "meta".
        max_norm: Number of records -> the largest L2 norm of a delta.
        example_bounds: Organization -> the smallest and largest number of records that it may declare; None if not agreed.
        max_examples: The largest number of records that any organization may declare.
        received: Digest of the model that updates must be trained from; None: any.
        steps_for: Number of records -> number of steps, if the plan gives epochs.
        max_steps: The largest number of steps.
        disclosures: Names of the allowed disclosures; None: any.
        max_disclosed: The largest magnitude of a disclosed number other than a loss.
        epsilon: The plan's ε, an upper bound of stated ones; None: none may be stated.
        needs_noise: Whether every update must state its noise, above 0.
        needs_loss: Whether every update must disclose its loss.
        smaller_ranks: Adapters that may have a smaller rank.
        statistics: Name -> shape of the arrays that the fusion needs beside the delta.
        max_bytes: Size of the largest reply that is read.
        heads: Task -> names of the parameters of its head, if there are several tasks; an update has the heads of its sender's
            tasks.
        predictions: The predictions that were sent, and the bounds of their values, if organizations share predictions instead
            of parameters.
    """

    round: int
    shapes: Mapping[str, Tensor]
    max_norm: Callable[[int], float] = _no_limit
    example_bounds: Mapping[str, ExampleBounds | None] = field(default_factory=dict)
    max_examples: int = sys.maxsize
    received: str | None = None
    steps_for: Callable[[int], int] | None = None
    max_steps: int | None = None
    disclosures: Collection[str] | None = None
    max_disclosed: float = math.inf
    epsilon: float | None = math.inf
    needs_noise: bool = False
    needs_loss: bool = False
    smaller_ranks: Sequence[Adapter] = ()
    statistics: Mapping[str, Shape] = field(default_factory=dict)
    max_bytes: int = sys.maxsize
    heads: Mapping[str, frozenset[str]] = field(default_factory=dict)
    predictions: tuple[Tensor, PublicConfig] | None = None

    @classmethod
    def build(
        cls,
        plan: Plan,
        context: RoundContext,
        shapes: Mapping[str, Tensor],
        statistics: Mapping[str, Shape],
        *,
        received: str,
        example_bounds: Mapping[str, ExampleBounds | None],
    ) -> UpdateSpec:
        """Derive the requirements of a round from its plan.

        Args:
            plan: The plan.
            context: The round, as fusion and weighting see it.
            shapes: Name -> value at the start of the round, for the parameters that it shares.
            statistics: Name -> shape of the arrays that the fusion needs beside the delta.
            received: Digest of the model in the requests.
            example_bounds: Organization -> the agreed bounds of its number of records, or None.
        """
        stage = plan.get_stage(context.round)
        local = stage.local
        longest = partial(bound_update_norm, plan, stage, entries=sum(t.numel() for t in shapes.values()), start=norm(shapes))
        own = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
        return cls(
            round=context.round,
            shapes={name: torch.empty(tensor.shape, device="meta") for name, tensor in shapes.items()},
            max_norm=lambda examples: _or_infinite(longest(examples=examples)),
            example_bounds=example_bounds,
            max_examples=plan.server.max_examples,
            received=received,
            steps_for=None if local.epochs is None else local.steps_per_round,
            max_steps=local.steps,
            disclosures=_allowed_disclosures(plan),
            max_disclosed=float(plan.server.max_examples),
            epsilon=plan.privacy.epsilon if isinstance(plan.privacy, RecordPrivacy) else None,
            needs_noise=plan.privacy != "none" and plan.strategy.compares_noise,
            needs_loss="loss" in plan.strategy.sends,
            smaller_ranks=context.adapters if plan.mixed_ranks else (),
            statistics=statistics,
            max_bytes=max_bytes(len(plan.canonical().encode()), own, statistics, plan.wire),
            heads=heads_of(plan, shapes),
            predictions=(shapes[SCORES], plan.public) if plan.shares_predictions else None,
        )

    def validate(self, update: Update, organization: str) -> ValidationResult:
        """Check an update, and report the first problem.

        Args:
            update: The decoded update.
            organization: Who was asked, and signed it.
        """
        reason = (
            self._check_origin(update, organization)
            or self._check_examples(update, organization)
            or self._check_work(update)
            or self._check_disclosures(update)
            or self._check_shapes(update.delta)
        )
        return ValidationResult(reason or self._check_numbers(update))

    def _check_numbers(self, update: Update) -> str:
        """Check all values, after names and shapes were checked."""
        max_norm = self.max_norm(update.examples)
        return (
            _check_values(update.delta, max_norm)
            or self._check_predictions(update.delta)
            or self._check_noise(update, max_norm**2)
            or self._check_loss(update)
            or self._check_statistics(update.statistics)
        )

    def _check_origin(self, update: Update, organization: str) -> str:
        if update.organization != organization:
            return f"it is from {update.organization[:80]}, expected {organization}"
        if update.round != self.round:
            return f"it is for round {update.round}, expected {self.round}"
        return ""

    def _check_examples(self, update: Update, organization: str) -> str:
        if update.examples < 1:
            return f"it declares {update.examples} examples, expected at least 1"
        agreed = self.example_bounds.get(organization) or (1, self.max_examples)
        least = max(1, agreed[0])
        most = min(self.max_examples, agreed[1])
        if not least <= update.examples <= most:
            return f"it declares {update.examples} examples, expected {least} to {most}"
        return ""

    def _check_work(self, update: Update) -> str:
        """Check the model that the update was trained from, and its number of steps."""
        if self.received is not None and update.received != self.received:
            return (
                f"it was trained from another model ({update.received[:12]}), expected that of this round ({self.received[:12]})"
            )
        if self.steps_for is not None and update.steps != self.steps_for(update.examples):
            return f"it states {update.steps} steps, expected {self.steps_for(update.examples)} with {update.examples} examples"
        if self.max_steps is not None and not 1 <= update.steps <= self.max_steps:
            return f"it states {update.steps} steps, expected 1 to {self.max_steps}"
        return ""

    def _check_disclosures(self, update: Update) -> str:
        """Check that only what was asked for is disclosed, in a plausible range, as it stays in the history forever."""
        surplus = sorted(update.disclosures.keys() - set(self.disclosures)) if self.disclosures is not None else []
        if surplus:
            return f"it discloses {surplus[0][:80]!r}, which the plan does not ask for"
        stated = update.epsilon
        if stated is not None and self.epsilon is None:
            return f"it states ε = {stated:g}, which a plan without privacy does not have"
        if stated is not None and self.epsilon is not None and not 0 <= stated <= self.epsilon + _EPSILON_ROUNDING:
            return f"it states ε = {stated:g}, expected 0 to {self.epsilon:g}, which the plan allows"
        for name, value in update.disclosures.items():
            if name == "loss" and not 0 <= value <= _MAX_LOSS:
                return f"it discloses a loss of {value:g}, expected 0 to {_MAX_LOSS:g}"
            if name != "loss" and not abs(value) <= self.max_disclosed:  # noised sums may be negative
                return f"it discloses {name[:80]!r} = {value:g}, expected -{self.max_disclosed:g} to {self.max_disclosed:g}"
        return ""

    def _check_shapes(self, delta: Mapping[str, Tensor]) -> str:
        wanted = self.shapes.keys() - self._absent_heads(delta)
        if delta.keys() != wanted:
            return _difference(delta, dict.fromkeys(wanted), "parameters")
        expected = {name: tuple(tensor.shape) for name, tensor in self.shapes.items()}
        for adapter in self.smaller_ranks:
            expected |= _shapes_of_rank(adapter, delta, expected)
        for name, tensor in delta.items():
            if tuple(tensor.shape) != expected[name]:
                return f"{name} has the shape {tuple(tensor.shape)}, expected {expected[name]}"
        return ""

    def _check_predictions(self, delta: Mapping[str, Tensor]) -> str:
        if self.predictions is None:
            return ""
        received, public = self.predictions
        extreme = find_extreme_score(received, delta[SCORES], public)
        return "" if extreme is None else f"its predictions reach {extreme:.3g}, expected {public.bound:g} at most"

    def _absent_heads(self, delta: Mapping[str, Tensor]) -> set[str]:
        """Return the parameters of heads that were not sent; none if no head was sent, as every organization has a task."""
        absent = [names for names in self.heads.values() if not names & delta.keys()]
        return set[str]().union(*absent) if len(absent) < len(self.heads) else set()

    def _check_noise(self, update: Update, max_variance: float) -> str:
        """Check the stated noise for plausibility; its truth cannot be verified.

        An organization that states too little noise counts more, but no more than with a thousandth of the median noise.

        Args:
            update: The update.
            max_variance: Of a single entry; its noise is a part of the update, and so bounded by the update's norm.
        """
        stated = update.noise_variance
        needed = self.needs_noise
        if stated is None:
            return "it does not state the noise that its privacy added, which the weighting of the plan needs" if needed else ""
        if stated.keys() != update.delta.keys():
            return f"it states noise for {len(stated)} parameters, expected it for the {len(update.delta)} of its delta"
        wrong = [name for name, value in stated.items() if not 0 <= value <= max_variance or (needed and value == 0)]
        if not wrong:
            return ""
        expected = "more than 0" if needed else "0 or more"
        if any(math.isfinite(stated[name]) and stated[name] > max_variance for name in wrong):
            expected += f", at most {max_variance:g}"
        return f"it states the noise variance {stated[wrong[0]]} for {wrong[0]}, expected a finite number, {expected}"

    def _check_loss(self, update: Update) -> str:
        if self.needs_loss and "loss" not in update.disclosures:
            return "it does not disclose the loss that the strategy of the plan needs"
        return ""

    def _check_statistics(self, found: Mapping[str, Tensor]) -> str:
        if found.keys() != self.statistics.keys():
            return _difference(found, self.statistics, "arrays")
        for name, tensor in found.items():
            if tuple(tensor.shape) != self.statistics[name]:
                return f"{name} has the shape {tuple(tensor.shape)}, expected {self.statistics[name]}"
            squares = tensor.diagonal() if name.startswith("gram/") else tensor
            if not is_finite(found, name) or bool((squares < 0).any()):
                return f"{name} has values that no sum of squares has: expected finite ones, 0 or more"
        return ""


def max_bytes(plan_length: int, shapes: Mapping[str, Shape], statistics: Mapping[str, Shape], codec: Codec) -> int:
    """Return the size limit of a reply in bytes, encoded or decoded: the arrays that are asked for, and 1 MiB.

    Args:
        plan_length: Length of the plan's text, which bounds the names of disclosures.
        shapes: Name -> shape of the parameters of a delta.
        statistics: Name -> shape of the arrays beside it.
        codec: Encodes the delta.
    """
    written = [(name, packed_bytes(codec, math.prod(shape))) for name, shape in shapes.items()]
    written += [(name, 4 * math.prod(shape)) for name, shape in statistics.items()]
    return sum(size + _ARRAY_HEAD + 4 * len(name) for name, size in written) + 4 * plan_length + 2**20


def one_line(text: str) -> str:
    """Return untrusted text in a form that is safe to show: one line of at most 500 visible characters."""
    return printable(" ".join(text.split()))[:_MAX_REASON_LENGTH]


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _allowed_disclosures(plan: Plan) -> set[str]:
    """Return what the plan asks organizations to disclose; each decides whether it does."""
    names = {f"label {label}" for label in plan.labels} if plan.disclosures.label_histogram else set()
    return names | ({"correct", "records"} if plan.disclosures.local_metrics else set()) | ({"loss"} & set(plan.strategy.sends))


def _difference(found: Mapping[str, object], expected: Mapping[str, object], what: str) -> str:
    extra = sorted(found.keys() - expected.keys())
    lacking = sorted(expected.keys() - found.keys())
    return f"it has {len(extra)} {what} too many and lacks {len(lacking)} ({', '.join([*extra, *lacking][:3])[:200]})"


def _shapes_of_rank(adapter: Adapter, delta: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes that an adapter's factors must have, given the rank of those received; empty if it is not a rank."""
    axes = {adapter.a: 0, adapter.b: 1}
    axes = {name: axis for name, axis in axes.items() if name in delta}
    rank = min((delta[name].shape[axis] for name, axis in axes.items() if delta[name].dim() == 2), default=0)
    if not 1 <= rank <= adapter.rank:
        return {}
    return {name: tuple(rank if i == axis else n for i, n in enumerate(expected[name])) for name, axis in axes.items()}


def _check_values(delta: Mapping[str, Tensor], max_norm: float) -> str:
    """Check norm and values in one pass: the norm is finite if all values are, unless they exceed the range of float32."""
    length = norm(delta)
    if not math.isfinite(length) and find_not_finite(delta):
        return "it has values that are not finite"
    if length > max_norm:
        return f"its norm is {length:.3g}, expected at most {max_norm:g}"
    if length > _MAX_CHANGE and (extreme := find_extreme(delta, _MAX_CHANGE)):
        return f"it changes {extreme[0]} by {extreme[1]:.3g}, expected at most {_MAX_CHANGE:g}"
    return ""
