"""From an answer to an update that may enter the model, or to the reason why it may not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from flwr.app import Message
from torch import Tensor

from cotune.models.errors import RunError
from cotune.models.terminal import printable
from cotune.plan.schema import Plan
from cotune.plan.update_norm import longest_update
from cotune.privacy.config import RecordPrivacy
from cotune.server.admission import most_bytes, reason_to_refuse
from cotune.server.members import Member
from cotune.strategies.round import RoundContext
from cotune.strategies.sums import norm
from cotune.strategies.updates import Update
from cotune.strategies.wire import decode_update, payload_bytes


@dataclass(frozen=True)
class Opened:
    """refused: there was an update, and it was not as agreed."""

    update: Update | None
    reason: str = ""
    refused: bool = False


class Verify:
    """What answers of one round are held to. most_bytes: of one.

    shapes: what the round shares. received: digest of what a request holds. members: in a real run, those that
    may take part, with the numbers of records that they may declare.
    """

    def __init__(
        self,
        plan: Plan,
        context: RoundContext,
        shapes: Mapping[str, Tensor],
        statistics: Mapping[str, tuple[int, ...]],
        *,
        received: str,
        members: Mapping[str, Member],
    ) -> None:
        self._plan, self._round, self._members = plan, context.round, members
        stage = plan.stage_of(context.round)
        local = stage.local
        entries = sum(tensor.numel() for tensor in shapes.values())
        self._longest = partial(longest_update, plan, stage, entries=entries, start=norm(shapes))
        own = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
        self.most_bytes = most_bytes(len(plan.canonical().encode()), own, statistics)
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

    def __call__(self, reply: Message, organisation: str) -> Opened:
        if not reply.has_content():
            return Opened(None, "its answer is empty")
        size = payload_bytes(reply.content)
        if size > self.most_bytes:
            return Opened(None, f"it has {size} bytes, expected at most {self.most_bytes}", refused=True)
        try:
            update = decode_update(reply.content, self._plan.plan_id)
        except RunError as error:
            return Opened(None, one_line(str(error)), refused=True)  # it may repeat a stranger's words
        allowed = self._examples(organisation)
        longest = self._longest(examples=min(max(update.examples, allowed[0]), allowed[1]))
        reason = self._refuse(
            update, organisation=organisation, examples=allowed, max_norm=math.inf if longest is None else longest
        )
        return Opened(update) if reason is None else Opened(None, one_line(reason), refused=True)

    def _examples(self, organisation: str) -> tuple[int, int]:
        most = self._plan.server.max_examples
        member = self._members.get(organisation)
        least, own = (member.examples if member else None) or (1, most)
        return max(1, least), min(most, own)


def _may_be_told(plan: Plan) -> set[str]:
    """What the plan asks to be told; each organisation decides for itself whether it does."""
    names = {f"label {label}" for label in plan.labels} if plan.tell.label_histogram else set()
    return names | ({"correct", "records"} if plan.tell.local_metrics else set()) | ({"loss"} & set(plan.strategy.sends))


def one_line(text: str) -> str:
    """A stranger's words, fit to be shown: one line in which nothing is hidden, at most 500 long."""
    return printable(" ".join(text.split()))[:500]
