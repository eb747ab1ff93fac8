"""Documents on disk: written atomically, and locked for one process.

One process at a time, also where one is killed: the system lets go of a lock when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import glob
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cotune.errors import RunError


def atomic_write(path: Path, content: bytes) -> None:
    """Writes, fsyncs and renames; when this returns, the file survives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    sync(path.parent)


def remove_parts(path: Path) -> None:
    """What killed processes have left of a file that they were writing; for a file that no other process writes now."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        part.unlink(missing_ok=True)


def sync(path: Path | str) -> None:
    """Fsyncs a file or a folder that is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_LOOK_SECONDS = 0.02


@contextmanager
def acquire_lock(file: Path, taken: str, *, patience: float = 0.0) -> Iterator[None]:
    """Keeps others out of the block. taken: the sentence for them. patience: seconds, where some hold it for a moment only.

    Raises RunError, also where the file cannot be written.
    """
    try:
        lock = open(file, "a")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{file.parent} cannot be written ({error.strerror}): make room for it, or mend its permissions") from None
    with lock:
        until = time.monotonic() + patience
        while not _take(lock):
            if time.monotonic() >= until:
                raise RunError(taken)
            time.sleep(_LOOK_SECONDS)
        yield


def _take(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
