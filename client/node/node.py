"""The resident node: it stays connected to a server, answers its requests, and reconnects.

It never receives code: sites only run their locally installed cotune. Training runs in a separate process (worker.py), so that
heartbeats continue during training, and a crash costs only one answer. A request is stored until it is answered, so that a
restarted node continues with it.

node/request.pb    in the site: the request that is being answered, without its content
node/id            the node's number at the server while it is online, and the server; a copy of the site is another node
node/lock          locked by the process that serves the site

A run's bundle (Flower's FAB, a zip archive) is inspected and never unpacked: a run whose bundle holds more than configuration is
refused.
"""

from __future__ import annotations

import logging
import platform
import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Message, MessageType

from cotune.client.audit_log import AuditLog
from cotune.client.local_events import notify
from cotune.client.node.bundle import reason_to_refuse
from cotune.client.node.worker import TrainerDied
from cotune.client.site_folder import NodePaths
from cotune.errors import RunError
from cotune.flower.chunks import Aborted, ChunkedMessage
from cotune.flower.fleet_client import AnnouncedRequest, FleetClient
from cotune.flower.fleet_errors import FleetError, RequestExpired
from cotune.protocol.refusals import GENERIC_REFUSAL, refusal
from cotune.storage.files import atomic_write

_POLL_SECONDS = 0.1
_MAX_POLL_SECONDS = 1.0
_BACKOFF = 0.05  # interval between polls, as a fraction of the time waited so far, which bounds the relative delay
# before it connects again
_MIN_WAIT_SECONDS = 0.5
_MAX_WAIT_SECONDS = 10.0
_log = logging.getLogger(__name__)

Connect = Callable[[int | None, bool], AbstractContextManager[FleetClient]]  # as `connected`: known, reconnect


class Worker(Protocol):
    """Answers messages; see `TrainerProcess`."""

    def submit(self, parcel: ChunkedMessage) -> None:
        """Start work on a message."""
        ...

    def poll(self, seconds: float) -> Message | None:
        """Wait for the reply; None if it has not arrived within `seconds`."""
        ...


class Node:
    """Answers one request at a time with a worker, until `stop`.

    Args:
        folder: The folder node/ of the site.
        sent: Log for the node's own refusals, written before they leave; the worker logs its answers itself.
        overdue: Seconds beyond its deadline after which training is stopped in favor of another request.
    """

    def __init__(
        self, folder: Path, worker: Worker, stop: threading.Event, sent: AuditLog | None = None, overdue: float = 60.0
    ) -> None:
        self._overdue = overdue
        self._worker = worker
        self._stop = stop
        self._sent = sent
        paths = NodePaths(folder)
        self._request_file = paths.request
        self._id_file = paths.id
        self._place = f"{platform.node()} {folder.resolve()}"
        self._deadline = 0.0  # of the request, by the monotonic clock
        self._request = self._kept_request()
        self._known = self._kept_id()
        self._in_doubt = True  # whether the server may have delivered a request that never arrived; it delivers each once
        self._is_opened = self._is_submitted = self._is_retry = (
            False  # its content was asked for; the worker has it; for the second time
        )
        self._worker_content = ""  # the content that the worker is processing for a node number that is no longer in use
        self._reply: Message | None = None
        self._own_entry: dict[str, Any] = {}  # the log entry, if the node itself answers
        self._began = self._active = time.monotonic()  # start of the request; last time of activity
        self._newest: dict[int, int] = {}  # run -> its newest round
        self._fit_run: int | None = None  # the last run whose bundle was accepted

    def run(self, connect: Connect) -> None:
        """Connect and serve, and reconnect with growing delays when the connection breaks."""
        wait = 0.0
        while not self._stop.wait(wait):
            started = time.monotonic()
            try:
                with connect(self._known, self._in_doubt and self._request is None) as fleet:
                    self._enter(fleet)
                    self.serve(fleet)
                    self._leave(fleet)
            except Exception as error:  # a resident node must survive unexpected failures, too
                lasted = time.monotonic() - started
                wait = _next_wait(0.0 if lasted > _MAX_WAIT_SECONDS else wait)
                unforeseen = None if isinstance(error, FleetError) else error
                notify("disconnected", reason=str(error))
                _log.warning("%s; the next attempt is in %.1f seconds", error, wait, exc_info=unforeseen)

    def serve(self, fleet: FleetClient) -> None:
        """Serve until `stop`; raises FleetError if the connection breaks. The request in progress is not lost."""
        while not self._stop.is_set():
            try:
                if not self._step(fleet):
                    waited = time.monotonic() - self._active
                    self._stop.wait(min(_MAX_POLL_SECONDS, max(_POLL_SECONDS, _BACKOFF * waited)))
            except RequestExpired as error:
                if self._request is None:
                    raise
                self._drop(fleet, str(error))

    def _step(self, fleet: FleetClient) -> bool:
        """Do the next thing; return False if there is nothing to do."""
        if self._request is None:
            self._request = self._receive(fleet)
            if self._request is None:
                return False
            self._accept(fleet, self._request)
        elif self._reply is not None:
            self._send(fleet, self._request, self._reply)
        elif self._is_submitted:
            self._wait_for_reply(fleet, self._request)
        else:
            self._begin(fleet, self._request)
        self._active = time.monotonic()
        return True

    def _receive(self, fleet: FleetClient) -> AnnouncedRequest | None:
        self._in_doubt = True
        request = fleet.receive()
        self._in_doubt = False
        return request

    def _accept(self, fleet: FleetClient, request: AnnouncedRequest) -> None:
        """Store a request; drop one whose reply is no longer expected. A final model may be that of an earlier round."""
        self._deadline = time.monotonic() + request.seconds
        round = int(request.round) if request.round.isdecimal() else 0
        newest = self._newest.get(request.run, 0)
        if round < newest and request.header.metadata.message_type == MessageType.TRAIN:
            return self._drop(fleet, f"round {newest} has come already")
        self._newest[request.run] = max(round, newest)
        self._began = time.monotonic()
        try:
            atomic_write(self._request_file, request.to_bytes())
        except OSError as error:
            reason = f"the site cannot be written ({error}): free space, or correct its permissions"
            self._refuse(request, GENERIC_REFUSAL, reason)

    def _begin(self, fleet: FleetClient, request: AnnouncedRequest) -> None:
        """Pass a request to the worker if the run's bundle is acceptable."""
        if self._is_late():
            return self._drop(fleet, "its time has passed")
        if request.run != self._fit_run:
            refused = reason_to_refuse(fleet.bundle(request.run))
            if refused is not None:
                _log.warning("run %s is refused: %s", request.run, refused)
                return self._refuse(request, refused, refused)
            self._fit_run = request.run
        if not self._is_working_on(request):
            self._submit(fleet, request)

    def _is_working_on(self, request: AnnouncedRequest) -> bool:
        """Return whether the worker is processing the same content, whose update will answer this request, too."""
        if self._worker_content and self._worker_content == _content_of(request):
            with suppress(TrainerDied):
                if self._worker.poll(_POLL_SECONDS) is None:
                    return True
        self._worker_content = ""
        return False

    def _submit(self, fleet: FleetClient, request: AnnouncedRequest) -> None:
        try:
            parcel = fleet.open(request)
            self._is_opened = True
            self._worker.submit(parcel)
            self._is_submitted = True
            _log.info("round %s of run %s begins", request.round, request.run)
            notify("begun", round=request.round, trains=request.header.metadata.message_type == MessageType.TRAIN)
        except FleetError:
            raise
        except Aborted as error:
            self._request_resend(fleet, error)
        except TrainerDied as error:
            self._handle_death(request, error)
        except Exception as error:  # untrusted content may be malformed in any way
            _log.warning("the request cannot be read: %s", error)
            self._refuse(request, GENERIC_REFUSAL, f"the request cannot be read: {error}")

    def _request_resend(self, fleet: FleetClient, error: Aborted) -> None:
        """Reconnect, so that the server asks again: its request was cut off, for example because the SuperLink was killed."""
        self._drop(fleet, f"{error}; it is to be asked again")
        self._in_doubt = True
        raise FleetError("a request did not come whole")

    def _refuse(self, request: AnnouncedRequest, said: str, reason: str) -> None:
        """Answer without the worker.

        Args:
            request: Which it answers.
            said: The text for the server.
            reason: The text for the organization's audit log.
        """
        self._reply = refusal(request.header, said)
        self._own_entry = {"what": "refusal", "round": request.round, "reason": reason}
        try:
            if self._sent is not None:
                self._sent.append(said=said, **self._own_entry)
        except RunError as error:  # without a signature, the refusal still reveals nothing about the records
            _log.error("%s", error)

    def _wait_for_reply(self, fleet: FleetClient, request: AnnouncedRequest) -> None:
        fleet.check_known()
        try:
            self._reply = self._worker.poll(_POLL_SECONDS)
        except TrainerDied as error:
            self._handle_death(request, error)
        if self._reply is None and time.monotonic() > self._deadline + self._overdue:
            newer = self._receive(fleet)
            if newer is not None:
                self._drop(fleet, "its time has long passed, and another one waits; what it was to spend counts as spent")
                self._request = newer
                self._accept(fleet, newer)

    def _handle_death(self, request: AnnouncedRequest, error: TrainerDied) -> None:
        """Retry a request once after its worker died, then refuse it.

        A worker that was killed costs time and, with privacy, the charges that it had reserved. One that crashes because of its
        work would crash again.
        """
        _log.error("round %s of run %s was not finished: %s", request.round, request.run, error)
        if self._is_retry:
            return self._refuse(request, GENERIC_REFUSAL, str(error))
        self._is_retry = True
        self._is_submitted = False
        notify("again", round=request.round, reason=str(error))

    def _is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def _send(self, fleet: FleetClient, request: AnnouncedRequest, reply: Message) -> None:
        if self._is_late():
            return self._drop(fleet, "its answer was too late")
        seconds = time.monotonic() - self._began
        fleet.send(reply, seconds)
        _log.info("round %s of run %s is answered after %.1f seconds", request.round, request.run, seconds)
        entry = self._own_entry or self._last_entry()
        self._forget(fleet, request)
        notify("answered", round=request.round, seconds=seconds, entry=entry)

    def _last_entry(self) -> dict[str, Any]:
        """Return the log entry that the worker has made about its answer."""
        return {} if self._sent is None else self._sent.last()

    def _drop(self, fleet: FleetClient, reason: str) -> None:
        assert self._request is not None
        _log.warning("round %s of run %s is dropped: %s", self._request.round, self._request.run, reason)
        notify("dropped", round=self._request.round, reason=reason)
        self._forget(fleet, self._request)

    def _forget(self, fleet: FleetClient, request: AnnouncedRequest) -> None:
        """Forget a request. One that was not opened is not confirmed: the server may still be uploading it, and would fail."""
        opened = self._is_opened
        self._request = None
        self._reply = None
        self._own_entry = {}
        self._is_opened = self._is_submitted = self._is_retry = False
        with suppress(OSError):
            self._request_file.unlink()
        if opened:
            with suppress(FleetError):
                fleet.confirm(request)

    def _enter(self, fleet: FleetClient) -> None:
        _log.info("connected as node %s", fleet.node_id)
        notify("connected", node=fleet.node_id)
        self._known = fleet.node_id
        self._in_doubt = False
        try:
            atomic_write(self._id_file, f"{fleet.node_id} {self._place}".encode())
        except OSError as error:
            _log.error("the site cannot be written (%s): free space, or correct its permissions", error)
        if self._request is not None and self._request.header.metadata.dst_node_id != fleet.node_id:
            self._worker_content = _content_of(self._request) if self._is_submitted and self._reply is None else ""
            self._drop(fleet, "the server knows this node by another number now, and asks it again")

    def _leave(self, fleet: FleetClient) -> None:
        """Notify the server that this node stops, so that it does not wait for an answer."""
        for file in (self._request_file, self._id_file):
            with suppress(OSError):
                file.unlink()
        with suppress(FleetError):
            fleet.leave()

    def _kept_request(self) -> AnnouncedRequest | None:
        try:
            kept = AnnouncedRequest.from_bytes(self._request_file.read_bytes())
            age = max(0.0, time.time() - self._request_file.stat().st_mtime)
            self._deadline = time.monotonic() + kept.header.metadata.ttl - age
            return kept
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            _log.warning("%s is damaged (%s): it is left out", self._request_file, error)
            return None

    def _kept_id(self) -> int | None:
        try:
            number, _, place = self._id_file.read_text(encoding="utf-8").partition(" ")
            return int(number) if place == self._place else None
        except (OSError, ValueError):
            return None


def _content_of(request: AnnouncedRequest) -> str:
    """Return the identifier of a request's content, a hash that is the same if it is sent again."""
    return str(request.tree.children[0].object_id) if request.tree.children else ""


def _next_wait(last: float) -> float:
    longest = min(_MAX_WAIT_SECONDS, max(_MIN_WAIT_SECONDS, 2 * last))
    return longest * random.uniform(0.8, 1.0)  # so that nodes do not reconnect all at once
