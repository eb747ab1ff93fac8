"""Turn replies into updates: verify the signature, validate, quarantine, and pass accepted updates on in their order.

One update at a time is in memory beside the running sum: the function that reads a reply takes the message out of it, and nothing
refers to an update that was passed on or written to disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from cotune.errors import CotuneError, RunError
from cotune.protocol.messages import decode_update, payload_bytes, write_out
from cotune.protocol.statements import UPDATE
from cotune.server.request_outcomes import Accepted, Declined, Outcome, Rejected
from cotune.server.rounds.run_environment import RunEnvironment, Trail
from cotune.server.rounds.updates.buffers import ReorderBuffer, UpdateStore
from cotune.server.rounds.updates.update_validation import UpdateSpec, one_line
from cotune.server.transport.base import Reply, Transport
from cotune.strategies.aggregator import Aggregator, Combination
from cotune.strategies.types import Update


@dataclass(frozen=True)
class _Read:
    """A reply that was read, with its update if it was accepted."""

    outcome: Outcome
    update: Update | None = None


def refuse_unsigned(trail: Trail, message: Message, kind: str, round: int, organization: str) -> Declined | Rejected | None:
    """Return the outcome of a reply without content that its organization signed; None for a signed reply.

    Args:
        trail: Verifies and records the signature.
        message: The reply.
        kind: `signatures.UPDATE` or `signatures.RECEIPT`.
        round: Of the request.
        organization: Whose reply it should be.
    """
    if message.has_error():
        return Declined(one_line(trail.accept_refusal(message, kind, round, organization)))
    if not message.has_content():
        return Declined("its answer is empty")
    wrong = trail.accept(message, kind, round, organization)
    return Rejected(one_line(wrong)) if wrong else None


class UpdateReceiver:
    """Reads the replies of one round (see `round.Receiver`)."""

    def __init__(
        self,
        environment: RunEnvironment,
        transport: Transport,
        store: UpdateStore,
        asked: Sequence[str],
        spec: UpdateSpec,
        combination: Combination,
    ) -> None:
        """Create the receiver of a round; it also receives updates of earlier rounds.

        Args:
            environment: The run.
            transport: It drops replies that are no longer needed at the end of the round.
            store: Buffers and quarantine.
            asked: Organizations, in the order in which their updates are added.
            spec: Requirements on their updates.
            combination: Where updates are added.
        """
        folder = environment.folder
        self._transport = transport
        self._trail = environment.trail
        self._plan_id = folder.plan.plan_id
        self._codec = folder.plan.wire
        self._everybody = [participant.name for participant in folder.file.participants]
        self._store = store
        self._spec = spec
        self._combination = combination
        self._turns = ReorderBuffer(asked, store.inbox, combination.add)
        store.late.begin_round(spec)

    def receive(self, reply: Reply) -> Outcome:
        """Read a reply of this round; pass on its update, and those that waited for it."""
        self._store.late.note(reply.round, reply.organization)
        outcome = self._admit(reply)
        self._turns.drain()
        return outcome

    def _admit(self, reply: Reply) -> Outcome:
        read = self._read(reply, self._spec)
        self._turns.put(reply.organization, read.update)
        return read.outcome

    def is_new_late(self, reply: Reply) -> bool:
        """Record a reply to an earlier round, and return whether it is the organization's first reply to it."""
        return self._store.late.note(reply.round, reply.organization)

    def folds(self, round: int) -> bool:
        """Return whether updates of an earlier round still enter this one."""
        return self._store.late.spec_of(round) is not None

    def receive_late(self, reply: Reply) -> Outcome:
        """Read a reply to an earlier round, and store its update on disk until the end of this one."""
        spec = self._store.late.spec_of(reply.round)
        assert spec is not None, "asked for only where `folds`"
        read = self._read(reply, spec)
        if read.update is not None:
            self._store.late.put(read.update)
        return read.outcome

    def record_refusal(self, reply: Reply) -> None:
        """Record the refusal of an organization that will be asked again, only in the trail."""
        message = reply.take()
        if isinstance(message, Message):
            self._trail.accept_refusal(message, UPDATE, reply.round, reply.organization)

    def end_round(self) -> None:
        """Pass on all updates that are still buffered, those of earlier rounds last."""
        self._turns.drain_all()
        if isinstance(self._combination, Aggregator):
            add = self._combination.add
            self._store.late.drain(self._everybody, lambda update: add(update, self._spec.round - update.round))
        self._store.inbox.clear()
        self._transport.forget(self._store.late.end_round(self._spec.round))

    # --- one reply

    def _read(self, reply: Reply, spec: UpdateSpec) -> _Read:
        """Verify a reply. It may be malformed in any way, which must not end the run; the server's own errors are raised."""
        message = reply.take()
        if not isinstance(message, Message):
            return _Read(self._keep(RecordDict(), reply, message.reason))
        try:
            read = self._verify(message, reply, spec)
        except (CotuneError, OSError, MemoryError):
            raise
        except Exception as error:
            read = _Read(Rejected(f"it cannot be read ({type(error).__name__})"))
        if isinstance(read.outcome, Rejected):
            content = message.content if message.has_content() else RecordDict()
            return _Read(self._keep(content, reply, read.outcome.reason))
        return read

    def _verify(self, message: Message, reply: Reply, spec: UpdateSpec) -> _Read:
        """Verify the organization's signature first, then validate the update."""
        name = reply.organization
        if refused := refuse_unsigned(self._trail, message, UPDATE, reply.round, name):
            return _Read(refused)
        size = payload_bytes(message.content)
        if size > spec.max_bytes:
            return _Read(Rejected(f"it has {size} bytes, expected at most {spec.max_bytes}"))
        try:
            update = decode_update(message.content, self._plan_id, codec=self._codec)
        except RunError as error:
            return _Read(Rejected(one_line(str(error))))  # the error may quote untrusted text
        result = spec.validate(update, name)
        if not result.is_valid:
            return _Read(Rejected(one_line(result.reason)))
        return _Read(Accepted(size, update.steps, update.epsilon, dict(update.disclosures)), update)

    def _keep(self, content: RecordDict, reply: Reply, reason: str) -> Rejected:
        """Quarantine a message; if that fails, only the reason is reported."""
        try:
            file = self._store.quarantine.keep(write_out(content), reply.organization, reply.round, reason)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            about = f"{reason} ({type(error).__name__})"
            file = self._store.quarantine.keep(RecordDict(), reply.organization, reply.round, about)
        return Rejected(reason, file)
