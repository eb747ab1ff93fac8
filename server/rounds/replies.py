"""A round's answers: each opened, verified, and added in its turn; what is not as agreed is shown and kept aside."""

from __future__ import annotations

from flwr.app import Message, RecordDict

from cotune.errors import CotuneError
from cotune.protocol.messages import payload_bytes
from cotune.protocol.signatures import UPDATE
from cotune.server.rounds.buffers import Late, Lateness, Quarantine, ReorderBuffer, SpillBuffer
from cotune.server.rounds.requests import RequestTracker
from cotune.server.rounds.round_result import RoundResult
from cotune.server.rounds.session import Session
from cotune.server.rounds.update_validation import Opened, Verify, one_line
from cotune.server.transport.base import Reply, Transport
from cotune.strategies.aggregator import Aggregator, Combination
from cotune.strategies.types import Update


class Gathering:
    """Of one run."""

    def __init__(self, session: Session, post: Transport) -> None:
        folder = session.folder
        self._post = post
        self._events = folder.events
        self._names = [participant.name for participant in folder.file.participants]
        self._inbox = SpillBuffer(folder.path / "inbox")
        self._quarantine = Quarantine(folder.path / "quarantine")
        self._lateness = Lateness(folder.plan.server, SpillBuffer(folder.path / "inbox" / "late"))
        self._trail = session.trail
        self._answered: set[Late] = set()

    def gather(
        self, asking: RequestTracker, round: int, verify: Verify, round_result: RoundResult, combination: Combination
    ) -> None:
        """Adds the updates as they come, each in its turn."""
        turns = ReorderBuffer(round_result.people, self._inbox)
        self._lateness.open(round, verify)
        for letter in asking.letters():
            if letter.round != round:
                self._receive_late(letter, round, round_result)
            elif asking.is_waited_for(letter):
                self._enter_refusal(letter)
            else:
                self._answered.add((round, letter.organization))
                update = self._admit(letter, verify, round, round_result)
                organization = letter.organization
                del letter
                for ready in turns.settle(organization, update):
                    update = None
                    combination.add(ready)
                    del ready
                del update
        for ready in turns.rest():
            combination.add(ready)
            del ready
        if isinstance(combination, Aggregator):
            for ready in self._lateness.take(self._names):
                combination.add(ready, round - ready.round)
                del ready
        self._inbox.clear()
        oldest = self._lateness.oldest(round)
        self._post.forget(oldest)
        self._answered = {each for each in self._answered if each[0] >= oldest}

    def _admit(self, letter: Reply, verify: Verify, round: int, round_result: RoundResult) -> Update | None:
        """The update in a letter, if it may enter the model; otherwise the organization is shown, with the reason."""
        name = letter.organization
        events = self._events
        update, size = self._opened(letter, verify, round, round_result)
        if update is None:
            return None
        round_result.admit(name, update, size)
        events.tell("update_received", round=round, organization=name, bytes=size, steps=update.steps, epsilon=update.epsilon)
        return update

    def _opened(self, letter: Reply, verify: Verify, round: int, round_result: RoundResult) -> tuple[Update | None, int]:
        """The update in a letter, if it is as agreed, and its size in bytes. The reply is not held any longer."""
        reply = letter.reply
        letter.reply = None
        name = letter.organization
        tell = self._events.tell
        opened = Opened(None, letter.refused, refused=True) if reply is None else self._looked_into(reply, letter, verify)
        if opened.update is not None and reply is not None:
            return opened.update, payload_bytes(reply.content)
        if letter.round == round:
            round_result.dropped[name] = opened.reason
        if not opened.refused:
            tell("update_dropped", round=letter.round, organization=name, reason=opened.reason)
            return None, 0
        file = self._kept(reply.content if reply else RecordDict(), name, letter.round, opened.reason)
        round_result.quarantined.append(name)
        tell("update_quarantined", round=letter.round, organization=name, reason=opened.reason, file=file)
        return None, 0

    def _enter_refusal(self, letter: Reply) -> None:
        """Of one that is asked again, in the trail alone."""
        reply = letter.reply
        letter.reply = None
        if reply is not None:
            self._trail.accept_refusal(reply, UPDATE, letter.round, letter.organization)

    def _kept(self, content: RecordDict, name: str, round: int, reason: str) -> str:
        """The file in quarantine; what cannot even be written there is described by its reason alone."""
        try:
            return self._quarantine.keep(content, name, round, reason)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            return self._quarantine.keep(RecordDict(), name, round, f"{reason} ({type(error).__name__})")

    def _looked_into(self, reply: Message, letter: Reply, verify: Verify) -> Opened:
        """What a stranger has sent may be wrong in any way, and must end nobody's run. Raises CotuneError for faults here."""
        try:
            return self._verified(reply, letter, verify)
        except (CotuneError, OSError, MemoryError):
            raise
        except Exception as error:
            return Opened(None, f"it cannot be read ({type(error).__name__})", refused=True)

    def _verified(self, reply: Message, letter: Reply, verify: Verify) -> Opened:
        """An answer is held to its organization's signature first, and to the plan then."""
        if reply.has_error():
            return Opened(None, one_line(self._trail.accept_refusal(reply, UPDATE, letter.round, letter.organization)))
        wrong = self._trail.accept(reply, UPDATE, letter.round, letter.organization) if reply.has_content() else ""
        return Opened(None, one_line(wrong), refused=True) if wrong else verify(reply, letter.organization)

    def _receive_late(self, letter: Reply, round: int, round_result: RoundResult) -> None:
        """An answer of an earlier round: put aside for the end of this one, or shown as ignored. Anyone who was asked twice
        counts
        once.
        """
        name = letter.organization
        tell = self._events.tell
        if (letter.round, name) in self._answered:
            return
        self._answered.add((letter.round, name))
        verify = self._lateness.verify_of(letter.round)
        if verify is None or name in round_result.left_out:
            tell("late_update_ignored", round=round, organization=name, of_round=letter.round)
            return
        update, size = self._opened(letter, verify, round, round_result)
        if update is not None:
            self._lateness.put(update)
            round_result.late.append({"organization": name, "round": letter.round})
            round_result.bytes_up += size
            tell("late_update_received", round=round, organization=name, of_round=letter.round, bytes=size)
