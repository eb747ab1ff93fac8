"""What the rounds of a run, and the delivery of its model, are given: how organizations are reached, who they are, who signs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message, RecordDict

from cotune.protocol.messages import Recipient
from cotune.protocol.signatures import parse_refusal
from cotune.server.runs.exclusions import StrikeRecord
from cotune.server.runs.run_folder import RunFolder
from cotune.server.time_limits import TIME_LIMITS, TimeLimits
from cotune.server.transport.base import Transport

ExampleBounds = tuple[int, int]  # between which numbers an organization's declared number of records must be


class Trail(Protocol):
    """Signs what the server asks for, and checks and records the signatures of what comes back."""

    def sign(
        self,
        kind: str,
        round: int,
        contents: Mapping[str, RecordDict],
        recipients: Iterable[Recipient],
        received: str,
        cohort: Iterable[str],
        fates: Mapping[str, StrikeRecord] | None = None,
    ) -> None:
        """Put a signature into each request, and record it.

        Args:
            kind: `signatures.TRAIN` or `signatures.FINISHED`.
            round: The round of the requests.
            contents: Organization -> its request, which is changed.
            recipients: The same organizations, as the requests were encoded for them.
            received: Digest of the model that the requests carry.
            cohort: Names of those that took part in the round before.
            fates: What became of earlier updates, of those that have to know.

        Raises:
            RunError: Without a signing key, and where the trail cannot be written.
        """
        ...

    def accept(self, reply: Message, kind: str, round: int, organization: str) -> str:
        """Take the signature out of a reply and record it.

        Args:
            reply: A reply with content, which is changed.
            kind: `signatures.UPDATE` or `signatures.RECEIPT`.
            round: The round of its request.
            organization: Who was asked.

        Returns:
            "" where the signature is that of the organization, else what is wrong.
        """
        ...

    def accept_refusal(self, reply: Message, kind: str, round: int, organization: str) -> str:
        """Return what an organization says instead of a reply of this kind, recorded where it has signed it."""
        ...


class NoTrail:
    """The trail of a simulation: nothing is signed there, and nothing verified."""

    def sign(
        self,
        kind: str,
        round: int,
        contents: Mapping[str, RecordDict],
        recipients: Iterable[Recipient],
        received: str,
        cohort: Iterable[str],
        fates: Mapping[str, StrikeRecord] | None = None,
    ) -> None:
        """Leave the requests as they are."""

    def accept(self, reply: Message, kind: str, round: int, organization: str) -> str:
        """Accept every reply."""
        return ""

    def accept_refusal(self, reply: Message, kind: str, round: int, organization: str) -> str:
        """Return what the organization says."""
        return parse_refusal(reply.error.reason or "")[0] or f"error {reply.error.code}"


@dataclass(frozen=True)
class Session:
    """One process's work on a run.

    Attributes:
        folder: The folder of the run.
        open_transport: Connects to the organizations; the caller that opens a transport closes it.
        read_members: Reads who may take part now, with the agreed bounds of their numbers of records (None: none are agreed).
        trail: Signs requests, and checks signatures of replies.
        limits: How often the server looks, and how long it waits, beside what the plan says.
        in_process: Whether the organizations are simulated in this very process, so that no message leaves it.
    """

    folder: RunFolder
    open_transport: Callable[[], Transport]
    read_members: Callable[[], Mapping[str, ExampleBounds | None]]
    trail: Trail
    limits: TimeLimits = TIME_LIMITS
    in_process: bool = False

    @property
    def is_real(self) -> bool:
        """Whether the run is one of a federation, and not a simulation."""
        return bool(self.folder.file.federation)
