"""Answers that come after their round: with server.late = fold they enter a later one, with less weight; else they are shown.

Which rounds can be answered late is kept in memory alone: after a restart their answers are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cotune.plan.tables import RoundsConfig
from cotune.server.inbox import Inbox
from cotune.server.verification import Verify
from cotune.strategies.updates import Update

Late = tuple[int, str]  # the round that the update is for, and the organisation


class Lateness:
    """Of one run. inbox: where late updates wait for the end of the round in which they came."""

    def __init__(self, config: RoundsConfig, inbox: Inbox) -> None:
        self._staleness = config.max_staleness if config.late == "fold" else 0
        self._inbox = inbox
        self._open: dict[int, Verify] = {}
        self._came: list[Late] = []

    def open(self, round: int, verify: Verify) -> None:
        """Late answers of this round, which is played now, will be held to this."""
        if self._staleness:
            self._open[round] = verify
        self._open = {number: held for number, held in self._open.items() if number >= round - self._staleness}

    def verify_of(self, round: int) -> Verify | None:
        """What an answer of an earlier round is held to; None where it comes too late."""
        return self._open.get(round)

    def oldest(self, round: int) -> int:
        """The last round whose answers nobody waits for after `round`."""
        return round - self._staleness

    def put(self, update: Update) -> None:
        self._inbox.put(len(self._came), update)
        self._came.append((update.round, update.organisation))

    def take(self, order: Sequence[str]) -> Iterator[Update]:
        """The late updates, by round and organisation, whoever came first."""
        came, self._came = self._came, []
        for number in sorted(range(len(came)), key=lambda i: (came[i][0], order.index(came[i][1]))):
            yield self._inbox.take(number)
