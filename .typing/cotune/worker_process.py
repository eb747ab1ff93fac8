"""A process of this program's own that works through a pipe, and ends with the process that started it, however that ends."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

if __name__ != "cotune.worker_process":
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.worker_process`")


class WorkerProcess:
    """A process that is started afresh (spawn), so that it shares no memory, no locks and no threads with this one.

    It watches its parent and kills itself when that has ended, also where the parent was killed. It may itself be killed at any
    moment: a call on `pipe` then raises EOFError or OSError.

    Args:
        work: A module's function. Called in the new process with its end of the pipe and the arguments.
        arguments: What `work` is called with; they are pickled.
        name: Of the process.
        ignored: Signals that the process ignores, such as the SIGINT that Ctrl-C sends to all processes of a terminal: the parent
            answers them for all.

    Attributes:
        pipe: This process's end of the pipe.
    """

    def __init__(
        self, work: Callable[..., None], *arguments: Any, name: str = "cotune", ignored: Collection[int] = (signal.SIGINT,)
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        level = logging.getLogger("cotune").getEffectiveLevel()
        self._process = context.Process(
            target=_run, args=(work, child_end, arguments, tuple(ignored), level), name=name, daemon=True
        )
        self._process.start()
        child_end.close()

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.is_alive()

    def wait(self) -> int | None:
        """Wait until the process has ended, and return its exit code; negative: the signal that ended it."""
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        """End the process at once, whatever it does, and close the pipe."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def receive_all(pipe: Connection) -> Iterator[Any]:
    """Yield what the parent sends, until it closes its end of the pipe."""
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        yield message


def _run(work: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...], ignored: tuple[int, ...], level: int) -> None:
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("cotune").setLevel(level)
    work(pipe, *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
