"""Processes that write chats out, forked from the preloaded server: a new interpreter takes longer to import than they work."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from cotune.data.inputs import chat_worker
from tests.support.fork_server import preloaded


class ChatProcess:
    """`chat_worker` in a process of its own, with those parts of subprocess.Popen that `chat_template` uses.

    Attributes:
        pid: Its number.
        stdin: For requests.
        stdout: For replies.
    """

    def __init__(self) -> None:
        context = preloaded()
        requests, asking = context.Pipe(duplex=False)
        replies, answering = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(requests, answering), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stdin = os.fdopen(os.dup(asking.fileno()), "wb")
        self.stdout = os.fdopen(os.dup(replies.fileno()), "rb")
        for end in (requests, asking, replies, answering):
            end.close()

    @property
    def returncode(self) -> int | None:
        """Its exit code; negative: the signal that ended it; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.join()


def _work(requests: Connection, replies: Connection) -> None:
    """What `python -m cotune.data.inputs.chat_worker` does."""
    os.dup2(requests.fileno(), 0)
    os.dup2(replies.fileno(), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    requests.close()
    replies.close()
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    chat_worker.main()
