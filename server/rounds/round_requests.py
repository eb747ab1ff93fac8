"""The requests of a round: with the whole state, or with what has changed since the version that an organization has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flwr.app import RecordDict
from torch import Tensor

from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.protocol.changes import RoundChange, count_cost
from cotune.protocol.messages import Recipient, RequestEncoder
from cotune.protocol.signatures import SIGNED
from cotune.reporting.documents.rounds import RoundEntry

_MAX_ARRAYS = 8192  # of the changes in a request: an organization takes a few MiB of what arrays have beside their values

ToWhole = Callable[[str, RecordDict], RecordDict]


class RoundRequests:
    """Encodes the requests of one round."""

    def __init__(
        self,
        plan: Plan,
        round: int,
        state: State,
        sent: Mapping[str, Tensor],
        *,
        changes: Sequence[RoundChange] = (),
        stays: bool = False,
    ) -> None:
        """Encode nothing yet.

        Args:
            plan: The plan.
            round: Number of the round.
            state: What organizations train from.
            sent: What the plan's client term sends beside it.
            changes: Of the rounds right before this one, the oldest first.
            stays: Whether requests stay in this process.
        """
        self._encoder = RequestEncoder(plan.canonical(), round, state, sent, stays=stays, changes=changes, codec=plan.wire_down)
        self._builds_on_versions = plan.wire_down != "float32"
        self._since = {change.round for change in changes if _is_smaller(plan, state, changes, change)}

    def encode(self, recipients: Sequence[Recipient], held: Mapping[str, int]) -> dict[str, RecordDict]:
        """Return organization -> its request.

        Args:
            recipients: Who is asked.
            held: Organization -> the round whose state it has, as it should; those that have none are left out.
        """
        return {who.organization: self._encode(who, held.get(who.organization, 0)) for who in recipients}

    def _encode(self, who: Recipient, held: int) -> RecordDict:
        return self._encoder.encode_since(who, held) if held in self._since else self._encoder.encode(who)

    def to_whole(self, recipients: Sequence[Recipient]) -> ToWhole | None:
        """Return how to exchange a request for the same one with the whole state and its signature; None if all have it."""
        if not self._builds_on_versions:
            return None
        known = {who.organization: who for who in recipients}

        def exchange(organization: str, content: RecordDict) -> RecordDict:
            signed = {SIGNED: content[SIGNED]} if SIGNED in content else {}
            return RecordDict({**self._encoder.encode(known[organization]), **signed})

        return exchange


def _is_smaller(plan: Plan, state: State, changes: Sequence[RoundChange], base: RoundChange) -> bool:
    """Return whether a request of all changes from one on takes fewer bytes than the whole state, and few enough arrays."""
    since = [change.values for change in changes if change.round >= base.round]
    added = {name: tensor for name, tensor in state.items() if name not in base.names}
    if sum(map(len, [*since, added])) > max(_MAX_ARRAYS, len(state)):
        return False
    cost = sum(count_cost(values, plan.wire_down) for values in since) + count_cost(added, "float32")
    return cost < count_cost(state, "float32")


def find_held(history: Sequence[RoundEntry], changes: Sequence[RoundChange]) -> dict[str, int]:
    """Return organization -> the last round that it has answered: it has the state that this began with, applied or not.

    Args:
        history: All finished rounds.
        changes: Only rounds from the oldest of them on are looked at, as nothing builds on others.
    """
    held: dict[str, int] = {}
    for entry in history[changes[0].round - 1 :] if changes else ():
        answered = {**dict.fromkeys(entry.participants, entry.round), **{late.organization: late.round for late in entry.late}}
        for name, round in answered.items():
            held[name] = max(round, held.get(name, 0))
    return held
