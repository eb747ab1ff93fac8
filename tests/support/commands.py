"""`cotune ARGUMENTS` in a real process, forked from the server that has imported what commands need.

The process has its own folder, environment, output, session and exit code, and is signalled and killed like any other. What it lacks
is an interpreter of its own: a test of what is imported, of warnings, or of the console script itself starts that script.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from threading import Thread
from types import TracebackType
from typing import TextIO

from tests.support.fork_server import preloaded
from tests.support.processes import start_from_the_same_server


class Command:
    """A process that plays a command, with those parts of subprocess.Popen that tests use.

    Args:
        arguments: What follows `cotune`.
        folder: The working directory.
        environ: All of its environment.
        log: File to which its output is appended; without one, output is read from `stdout` and `stderr`.
        new_workers: Whether its worker processes are new interpreters, as outside of tests. Otherwise they are forked as well.
        programs: Folder of programs that it starts in place of this Python's.

    Attributes:
        pid: Its number.
        stdout: What it prints, as text; None where that goes to a log.
        stderr: Likewise.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        folder: Path,
        environ: Mapping[str, str],
        log: Path | None = None,
        *,
        new_workers: bool = False,
        programs: Path | None = None,
    ) -> None:
        ends = [_pipe(), _pipe()] if log is None else [(None, _append(log)), (None, _append(log))]
        (self.stdout, out), (self.stderr, err) = ends
        words = [str(word) for word in arguments]
        self._process = preloaded().Process(target=_play, args=(words, folder, dict(environ), out, err, new_workers, programs))
        self._process.start()
        out.close()
        err.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code; negative: the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and return its exit code. Raises subprocess.TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("cotune", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended, and return what it has printed that was not read before."""
        found = {"out": "", "err": ""}
        streams = {"out": self.stdout, "err": self.stderr}
        readers = [Thread(target=_drain, args=(stream, found, name), daemon=True) for name, stream in streams.items()]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return found["out"], found["err"]

    def send_signal(self, number: Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(SIGKILL)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.kill()
        self.wait()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()


def _pipe() -> tuple[TextIO, Connection]:
    receiver, sender = preloaded().Pipe(duplex=False)
    stream = os.fdopen(os.dup(receiver.fileno()), encoding="utf-8")
    receiver.close()
    return stream, sender


def _append(log: Path) -> Connection:
    return Connection(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), readable=False)


def _drain(stream: TextIO | None, found: dict[str, str], name: str) -> None:
    if stream is not None:
        found[name] = stream.read()


def _play(
    arguments: list[str],
    folder: Path,
    environ: dict[str, str],
    out: Connection,
    err: Connection,
    new_workers: bool,
    programs: Path | None,
) -> None:
    """What the console script does."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # the server's own may be a file, in which one can seek
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = ["cotune", *arguments]
    import torch

    from cotune.cli.main import run

    torch.set_num_threads(1)
    if not new_workers:
        start_from_the_same_server()
    if programs is not None:
        _find_first(programs)
    run()


def _find_first(programs: Path) -> None:
    """Let `server start` look there first, and where this Python's programs are by the path."""
    found = sysconfig.get_path
    sysconfig.get_path = lambda name, *rest: str(programs) if name == "scripts" else found(name, *rest)
