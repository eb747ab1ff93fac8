"""The process that trains for a node with the locally installed cotune; it caches the model of the last plan between rounds.

It is a new process (spawn), which ends with the node however that ends. It may itself end at any time without affecting the node.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Message, RecordDict, UserConfig

from cotune.errors import RunError
from cotune.flower.chunks import ChunkedMessage, Malformed, TooLarge
from cotune.printable import clean_output
from cotune.protocol.refusals import GENERIC_REFUSAL, refusal
from cotune.worker_process import WorkerProcess, receive_all

_log = logging.getLogger(__name__)


class TrainerDied(Exception):
    """The process ended before it answered."""


class TrainerProcess:
    """A process that answers one message at a time for a site.

    Messages are passed in chunks, as only the process, which has the model, decides what they may contain (request_limits.py).

    Args:
        folder: Of the site.
        server: The server's name in the audit log.
    """

    def __init__(self, folder: Path, server: str = "") -> None:
        self._folder = folder
        self._server = server
        self._busy = False
        self._process = self._start()

    def _start(self) -> WorkerProcess:
        # a terminal or a service sends signals to both processes; only the node handles them
        return WorkerProcess(_work, self._folder, self._server, name="cotune-resident", ignored=(signal.SIGINT, signal.SIGTERM))

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    def submit(self, parcel: ChunkedMessage) -> None:
        """Start work on a message, in a new process if the old one has ended, or is busy with a message that was given up.

        Raises:
            TrainerDied: If the process ends.
        """
        if self._busy or not self._process.is_alive():
            self.stop()
            self._process = self._start()
        self._busy = True
        try:
            self._process.pipe.send(parcel)
        except OSError:
            raise self._died() from None

    def poll(self, seconds: float) -> Message | None:
        """Wait for the reply; None if it has not arrived within `seconds`.

        Raises:
            TrainerDied: If the process has ended.
        """
        try:
            if not self._process.pipe.poll(seconds):
                return None
            reply: Message = self._process.pipe.recv()
            self._busy = False
            return reply
        except (EOFError, OSError):
            raise self._died() from None

    def stop(self) -> None:
        """Kill the process. Its work is lost, except for what is stored in the site."""
        self._process.kill()

    def _died(self) -> TrainerDied:
        return TrainerDied(f"the training process ended with {self._process.wait()}: perhaps memory ran out")


def _work(pipe: Connection, folder: Path, server: str) -> None:
    """Answer messages until the node ends; the main function of the process."""
    clean_output()
    os.umask(0o077)  # its files are private to the organization
    import cotune.client.app  # noqa: F401  # not above: the process watches its parent before it imports torch

    for parcel in receive_all(pipe):
        pipe.send(_answer(parcel, folder, server))


def _answer(parcel: ChunkedMessage, folder: Path, server: str = "") -> Message:
    from cotune.client.app import app
    from cotune.client.audit_log import AuditLog
    from cotune.client.node.request_limits import read_message
    from cotune.client.site import Site

    header = parcel.header("")
    about = header.metadata
    site = UserConfig({"site": str(folder), "server": server})
    context = Context(about.run_id, about.dst_node_id, site, RecordDict(), UserConfig())
    try:
        return app(read_message(parcel, Site(folder)), context)
    except Exception as error:  # such as a message of a kind that is not served
        foreseen = isinstance(error, TooLarge | Malformed)
        _log.error("the message could not be answered: %s", error, exc_info=None if foreseen else error)
        with suppress(RunError):  # what is refused without it says nothing of the records
            AuditLog(folder).append("refusal", server=server, said=GENERIC_REFUSAL, reason=f"{type(error).__name__}: {error}")
        return refusal(header, GENERIC_REFUSAL)
