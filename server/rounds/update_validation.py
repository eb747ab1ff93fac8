"""From an answer to an update that may enter the model, or to the reason why it may not.

Whether an update may enter the model. The coordinator trusts nobody: what is not as agreed is refused, with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from flwr.app import Message
from torch import Tensor

from cotune.errors import RunError
from cotune.models.adapter import Adapter
from cotune.plan.schema import Plan
from cotune.plan.update_norm import longest_update
from cotune.printable import printable
from cotune.privacy.config import RecordPrivacy
from cotune.protocol.messages import decode_update, payload_bytes
from cotune.server.rounds.session import ExampleBounds
from cotune.strategies.sums import norm
from cotune.strategies.types import RoundContext, Update, find_not_finite

_ARRAY_HEAD = 1024  # bytes that an array has beside its values and its name, and some to spare
_ROUNDED_UP = 0.0100001  # an ε is stated with two digits after the point, and never below what it is
_MOST_LOSS = 1e6  # nats: no model that trains at all is so wrong, and powers of more would overflow


def reason_to_refuse(
    update: Update,
    *,
    organization: str,
    round: int,
    shapes: Mapping[str, Tensor],
    max_norm: float,
    noise_needed: bool = False,
    smaller: Sequence[Adapter] = (),
    loss_needed: bool = False,
    statistics: Mapping[str, tuple[int, ...]] | None = None,
    steps_of: Callable[[int], int] | None = None,
    most_steps: int | None = None,
    examples: tuple[int, int] | None = None,
    received: str | None = None,
    told: Collection[str] | None = None,
    most_told: float = math.inf,
    epsilon: float | None = math.inf,
) -> str | None:
    """What is wrong with an update, in words; None when it may enter.

    shapes: the parameters that the round shares, with their tensors. noise_needed: every update must state its noise, above 0.
    loss_needed: and tell its loss. smaller: adapters that may come with a smaller rank. statistics: the arrays that the fusion
    wants beside the delta, with their shapes. steps_of: examples -> steps, where these follow from those. most_steps: the plan's.
    examples: between which numbers the declared one must be. received: the digest of what the round was trained from. told: the
    names of what may be told beside the update; None: whatever. most_told: how large a told number may be, but for a loss.
    epsilon: the plan's, which no stated one exceeds; None: none may be stated.
    """
    if update.organization != organization:
        return f"it is from {update.organization[:80]}, expected {organization}"
    if update.round != round:
        return f"it is for round {update.round}, expected {round}"
    if update.examples < 1:
        return f"it declares {update.examples} examples, expected at least 1"
    if examples is not None and not examples[0] <= update.examples <= examples[1]:
        return f"it declares {update.examples} examples, expected {examples[0]} to {examples[1]}"
    if received is not None and update.received != received:
        return f"it was trained from another model ({update.received[:12]}), expected that of this round ({received[:12]})"
    if steps_of is not None and update.steps != steps_of(update.examples):
        return f"it states {update.steps} steps, expected {steps_of(update.examples)} with {update.examples} examples"
    if most_steps is not None and not 1 <= update.steps <= most_steps:
        return f"it states {update.steps} steps, expected 1 to {most_steps}"
    surplus = sorted(update.told.keys() - set(told)) if told is not None else []
    if surplus:
        return f"it tells {surplus[0][:80]!r}, which the plan does not ask for"
    return (
        _wrong_figures(update, most_told, epsilon)
        or _wrong_tensors(update.delta, shapes, smaller)
        or _wrong_values(update.delta, max_norm)
        or _wrong_noise(update, needed=noise_needed, most=max_norm**2)
        or (_wrong_loss(update) if loss_needed else None)
        or _wrong_statistics(update.statistics, statistics or {})
    )


def max_bytes(plan: int, shapes: Mapping[str, tuple[int, ...]], statistics: Mapping[str, tuple[int, ...]]) -> int:
    """How large an answer may be, on its way and put together: the arrays that are asked for, and 1 MiB.

    plan: the length of its text, which names all that may be told. shapes: of the delta.
    """
    arrays = [*shapes.items(), *statistics.items()]
    return sum(4 * math.prod(shape) + _ARRAY_HEAD + 4 * len(name) for name, shape in arrays) + 4 * plan + 2**20


def _wrong_figures(update: Update, most_told: float, epsilon: float | None) -> str | None:
    """Whatever is only shown, and shown for ever: in a range that can be true."""
    stated = update.epsilon
    if stated is not None and epsilon is None:
        return f"it states ε = {stated:g}, which a plan without privacy does not have"
    if stated is not None and epsilon is not None and not 0 <= stated <= epsilon + _ROUNDED_UP:
        return f"it states ε = {stated:g}, expected 0 to {epsilon:g}, which the plan allows"
    for name, value in update.told.items():
        if name == "loss" and not 0 <= value <= _MOST_LOSS:
            return f"it tells a loss of {value:g}, expected 0 to {_MOST_LOSS:g}"
        if name != "loss" and not abs(value) <= most_told:  # sums with noise may be below 0
            return f"it tells {name[:80]!r} = {value:g}, expected -{most_told:g} to {most_told:g}"
    return None


def _wrong_tensors(delta: Mapping[str, Tensor], shapes: Mapping[str, Tensor], smaller: Sequence[Adapter]) -> str | None:
    if delta.keys() != shapes.keys():
        extra = sorted(delta.keys() - shapes.keys())
        lacking = sorted(shapes.keys() - delta.keys())
        return f"it has {len(extra)} parameters too many and lacks {len(lacking)} ({', '.join([*extra, *lacking][:3])[:200]})"
    expected = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
    for adapter in smaller:
        expected |= _of_its_rank(adapter, delta, expected)
    for name, tensor in delta.items():
        if tuple(tensor.shape) != expected[name]:
            return f"{name} has the shape {tuple(tensor.shape)}, expected {expected[name]}"
    return None


def _of_its_rank(
    adapter: Adapter, delta: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes that an adapter's factors must have by the rank that they came with; nothing where that is no rank."""
    axes = {adapter.a: 0, adapter.b: 1}
    axes = {name: axis for name, axis in axes.items() if name in delta}
    rank = min((delta[name].shape[axis] for name, axis in axes.items() if delta[name].dim() == 2), default=0)
    if not 1 <= rank <= adapter.rank:
        return {}
    return {name: tuple(rank if i == axis else n for i, n in enumerate(expected[name])) for name, axis in axes.items()}


def _wrong_values(delta: Mapping[str, Tensor], max_norm: float) -> str | None:
    if find_not_finite(delta):
        return "it has values that are not finite"
    length = norm(delta)
    return f"its norm is {length:.3g}, expected at most {max_norm:g}" if length > max_norm else None


def _wrong_noise(update: Update, *, needed: bool, most: float) -> str | None:
    """A stated noise is believed: who states too little counts for more, but for no more than a thousandth of the
    median noise would. most: of a single entry, whose noise is a part of the update and so within its norm."""
    stated = update.noise_variance
    if stated is None:
        return "it does not state the noise that its privacy added, which the weighting of the plan needs" if needed else None
    if stated.keys() != update.delta.keys():
        return f"it states noise for {len(stated)} parameters, expected it for the {len(update.delta)} of its delta"
    wrong = [n for n, v in stated.items() if not 0 <= v <= most or (needed and v == 0)]
    more = "more than 0" if needed else "0 or more"
    more += f", at most {most:g}" if any(math.isfinite(stated[n]) and stated[n] > most for n in wrong) else ""
    return f"it states the noise variance {stated[wrong[0]]} for {wrong[0]}, expected a finite number, {more}" if wrong else None


def _wrong_loss(update: Update) -> str | None:
    return None if "loss" in update.told else "it does not tell the loss that the strategy of the plan needs"


def _wrong_statistics(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    if found.keys() != expected.keys():
        extra = sorted(found.keys() - expected.keys())
        lacking = sorted(expected.keys() - found.keys())
        return f"it has {len(extra)} arrays too many and lacks {len(lacking)} ({', '.join([*extra, *lacking][:3])[:200]})"
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected[name]:
            return f"{name} has the shape {tuple(tensor.shape)}, expected {expected[name]}"
        squares = tensor.diagonal() if name.startswith("gram/") else tensor
        if not bool(tensor.isfinite().all()) or bool((squares < 0).any()):
            return f"{name} has values that no sum of squares has: expected finite ones, 0 or more"
    return None


@dataclass(frozen=True)
class Opened:
    """refused: there was an update, and it was not as agreed."""

    update: Update | None
    reason: str = ""
    refused: bool = False


class Verify:
    """What answers of one round are held to. max_bytes: of one.

    shapes: what the round shares. received: digest of what a request holds. bounds: organization -> between which
    numbers its declared number of records must be.
    """

    def __init__(
        self,
        plan: Plan,
        context: RoundContext,
        shapes: Mapping[str, Tensor],
        statistics: Mapping[str, tuple[int, ...]],
        *,
        received: str,
        bounds: Mapping[str, ExampleBounds | None],
    ) -> None:
        self._plan = plan
        self._round = context.round
        self._bounds = bounds
        stage = plan.stage_of(context.round)
        local = stage.local
        entries = sum(tensor.numel() for tensor in shapes.values())
        self._longest = partial(longest_update, plan, stage, entries=entries, start=norm(shapes))
        own = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
        self.max_bytes = max_bytes(len(plan.canonical().encode()), own, statistics)
        self._refuse = partial(
            reason_to_refuse,
            round=context.round,
            shapes={name: torch.empty(tensor.shape, device="meta") for name, tensor in shapes.items()},
            statistics=statistics,
            steps_of=None if local.epochs is None else local.steps_of,
            most_steps=local.steps,
            smaller=context.adapters if plan.mixed_ranks else (),
            noise_needed=plan.privacy != "none" and plan.strategy.compares_noise,
            loss_needed="loss" in plan.strategy.sends,
            received=received,
            told=_may_be_told(plan),
            most_told=float(plan.server.max_examples),
            epsilon=plan.privacy.epsilon if isinstance(plan.privacy, RecordPrivacy) else None,
        )

    def __call__(self, reply: Message, organization: str) -> Opened:
        if not reply.has_content():
            return Opened(None, "its answer is empty")
        size = payload_bytes(reply.content)
        if size > self.max_bytes:
            return Opened(None, f"it has {size} bytes, expected at most {self.max_bytes}", refused=True)
        try:
            update = decode_update(reply.content, self._plan.plan_id)
        except RunError as error:
            return Opened(None, one_line(str(error)), refused=True)  # it may repeat a stranger's words
        allowed = self._examples(organization)
        longest = self._longest(examples=min(max(update.examples, allowed[0]), allowed[1]))
        reason = self._refuse(
            update, organization=organization, examples=allowed, max_norm=math.inf if longest is None else longest
        )
        return Opened(update) if reason is None else Opened(None, one_line(reason), refused=True)

    def _examples(self, organization: str) -> tuple[int, int]:
        most = self._plan.server.max_examples
        least, own = self._bounds.get(organization) or (1, most)
        return max(1, least), min(most, own)


def _may_be_told(plan: Plan) -> set[str]:
    """What the plan asks to be told; each organization decides for itself whether it does."""
    names = {f"label {label}" for label in plan.labels} if plan.tell.label_histogram else set()
    return names | ({"correct", "records"} if plan.tell.local_metrics else set()) | ({"loss"} & set(plan.strategy.sends))


def one_line(text: str) -> str:
    """A stranger's words, fit to be shown: one line in which nothing is hidden, at most 500 long."""
    return printable(" ".join(text.split()))[:500]
