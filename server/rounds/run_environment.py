"""What the rounds of a run and the delivery of its model depend on: transport, members, and trail of signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message, RecordDict

from cotune.protocol.messages import Recipient
from cotune.protocol.refusals import parse_refusal
from cotune.server.runs.exclusions import StrikeRecord
from cotune.server.runs.run_folder import RunFolder
from cotune.server.time_limits import TIME_LIMITS, TimeLimits
from cotune.server.transport.base import Transport

ExampleBounds = tuple[int, int]  # the smallest and largest number of records that an organization may declare


class Trail(Protocol):
    """Signs the server's requests, and verifies and records the signatures of replies."""

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
        """Add a signature to each request, and record it.

        Args:
            kind: `signatures.TRAIN` or `signatures.FINISHED`.
            round: The round of the requests.
            contents: Organization -> its request, which is changed in place.
            recipients: The same organizations, as the requests were encoded for them.
            received: Digest of the model in the requests.
            cohort: Names of the organizations in the cohort.
            fates: Organization -> outcome of its earlier updates, for those that must be notified.

        Raises:
            RunError: If there is no signing key, or the trail cannot be written.
        """
        ...

    def accept(self, reply: Message, kind: str, round: int, organization: str) -> str:
        """Remove the signature from a reply, verify it and record it.

        Args:
            reply: A reply with content, which is changed in place.
            kind: `signatures.UPDATE` or `signatures.RECEIPT`.
            round: The round of its request.
            organization: Who was asked.

        Returns:
            "" if the signature is that of the organization, else what is wrong.
        """
        ...

    def accept_refusal(self, reply: Message, kind: str, round: int, organization: str) -> str:
        """Return an organization's reason for its refusal, and record it if it is signed.

        Args:
            reply: A reply with an error.
            kind: The kind of reply that was expected.
            round: The round of its request.
            organization: Who was asked.
        """
        ...


class NoTrail:
    """The trail of a simulation, in which nothing is signed or verified."""

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
        """Return the organization's reason."""
        return parse_refusal(reply.error.reason or "")[0] or f"error {reply.error.code}"


@dataclass(frozen=True)
class RunEnvironment:
    """One process's work on a run.

    Attributes:
        folder: The folder of the run.
        open_transport: Connects to the organizations; the caller that opens a transport closes it.
        read_members: Reads who may take part now, with the agreed bounds of their numbers of records (None: not agreed).
        trail: Signs requests, and verifies signatures of replies.
        limits: Intervals and timeouts of the server that are not in the plan.
        in_process: Whether organizations are simulated in this process, so that no message leaves it.
    """

    folder: RunFolder
    open_transport: Callable[[], Transport]
    read_members: Callable[[], Mapping[str, ExampleBounds | None]]
    trail: Trail
    limits: TimeLimits = TIME_LIMITS
    in_process: bool = False

    @property
    def is_real(self) -> bool:
        """Whether the run belongs to a federation, rather than a simulation."""
        return bool(self.folder.file.federation)
