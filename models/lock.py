"""One process at a time, also where one is killed: the system lets go of a lock when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cotune.models.errors import RunError

_LOOK_SECONDS = 0.02


@contextmanager
def only_one(file: Path, taken: str, *, patience: float = 0.0) -> Iterator[None]:
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
