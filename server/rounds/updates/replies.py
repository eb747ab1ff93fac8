"""From replies to updates: signature, validation, quarantine; each accepted update is passed on in its turn.

One update at a time is in memory beside the running sum. A reply's message is taken out of it by the one function that reads it,
and an update is held by nobody once it was passed on or written to disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from cotune.errors import CotuneError, RunError
from cotune.protocol.messages import decode_update, payload_bytes, write_out
from cotune.protocol.signatures import UPDATE
from cotune.server.outcomes import Accepted, Declined, Outcome, Rejected
from cotune.server.rounds.session import Session, Trail
from cotune.server.rounds.updates.buffers import ReorderBuffer, UpdateStore
from cotune.server.rounds.updates.update_validation import UpdateSpec, one_line
from cotune.server.transport.base import Reply, Transport
from cotune.strategies.aggregator import Aggregator, Combination
from cotune.strategies.types import Update


@dataclass(frozen=True)
class _Read:
    """A reply as it was read. update: where the outcome is that it was accepted."""

    outcome: Outcome
    update: Update | None = None


def refuse_unsigned(trail: Trail, message: Message, kind: str, round: int, organization: str) -> Declined | Rejected | None:
    """Return the outcome of a reply that holds no content signed by its organization; None for one that does.

    Args:
        trail: Checks and records the signature.
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
        session: Session,
        transport: Transport,
        store: UpdateStore,
        asked: Sequence[str],
        spec: UpdateSpec,
        combination: Combination,
    ) -> None:
        """Create the receiver of a round; updates of earlier rounds are received from now on, too.

        Args:
            session: The run.
            transport: Told at the end of the round which replies are not needed any more.
            store: Where updates wait or stay.
            asked: Organizations, in the order in which their updates are added.
            spec: What their updates must be like.
            combination: Where updates are added.
        """
        folder = session.folder
        self._transport = transport
        self._trail = session.trail
        self._plan_id = folder.plan.plan_id
        self._codec = folder.plan.wire
        self._everybody = [participant.name for participant in folder.file.participants]
        self._store = store
        self._spec = spec
        self._combination = combination
        self._turns = ReorderBuffer(asked, store.inbox, combination.add)
        store.late.begin_round(spec)

    def receive(self, reply: Reply) -> Outcome:
        """Read a reply of this round, and pass on its update, and those that waited for it."""
        self._store.late.note(reply.round, reply.organization)
        outcome = self._admit(reply)
        self._turns.drain()
        return outcome

    def _admit(self, reply: Reply) -> Outcome:
        read = self._read(reply, self._spec)
        self._turns.put(reply.organization, read.update)
        return read.outcome

    def is_new_late(self, reply: Reply) -> bool:
        """Note a reply of an earlier round, and return whether it is the first of its organization to that round."""
        return self._store.late.note(reply.round, reply.organization)

    def folds(self, round: int) -> bool:
        """Return whether updates of an earlier round still enter this one."""
        return self._store.late.spec_of(round) is not None

    def receive_late(self, reply: Reply) -> Outcome:
        """Read a reply of an earlier round, and keep its update on disk for the end of this one."""
        spec = self._store.late.spec_of(reply.round)
        assert spec is not None, "asked for only where `folds`"
        read = self._read(reply, spec)
        if read.update is not None:
            self._store.late.put(read.update)
        return read.outcome

    def record_refusal(self, reply: Reply) -> None:
        """Record the refusal of an organization that is asked again, in the trail alone."""
        message = reply.take()
        if isinstance(message, Message):
            self._trail.accept_refusal(message, UPDATE, reply.round, reply.organization)

    def end_round(self) -> None:
        """Pass on what is still held back, those of earlier rounds last."""
        self._turns.drain_all()
        if isinstance(self._combination, Aggregator):
            add = self._combination.add
            self._store.late.drain(self._everybody, lambda update: add(update, self._spec.round - update.round))
        self._store.inbox.clear()
        self._transport.forget(self._store.late.end_round(self._spec.round))

    # --- one reply

    def _read(self, reply: Reply, spec: UpdateSpec) -> _Read:
        """A stranger's message may be wrong in any way, and must end nobody's run. Raises CotuneError for faults here."""
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
        """A reply is held to its organization's signature first, and to the plan then."""
        name = reply.organization
        if refused := refuse_unsigned(self._trail, message, UPDATE, reply.round, name):
            return _Read(refused)
        size = payload_bytes(message.content)
        if size > spec.max_bytes:
            return _Read(Rejected(f"it has {size} bytes, expected at most {spec.max_bytes}"))
        try:
            update = decode_update(message.content, self._plan_id, codec=self._codec)
        except RunError as error:
            return _Read(Rejected(one_line(str(error))))  # it may repeat a stranger's words
        result = spec.validate(update, name)
        if not result.is_valid:
            return _Read(Rejected(one_line(result.reason)))
        return _Read(Accepted(size, update.steps, update.epsilon, dict(update.disclosures)), update)

    def _keep(self, content: RecordDict, reply: Reply, reason: str) -> Rejected:
        """Put a message into quarantine; what cannot even be written there is described by its reason alone."""
        try:
            file = self._store.quarantine.keep(write_out(content), reply.organization, reply.round, reason)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            about = f"{reason} ({type(error).__name__})"
            file = self._store.quarantine.keep(RecordDict(), reply.organization, reply.round, about)
        return Rejected(reason, file)
