"""Documents on disk: written atomically, locked for one process, and read with a limit to their depth.

One process at a time, also where one is killed: the system lets go of a lock when its process ends, however it ends.

JSON and TOML that somebody else has written: what is nested too deep for Python's readers is malformed like anything else.

Python's reader of TOML notes every beginning of a key with dots: one of 100,000 parts, 200 kB, takes 40 GB of memory.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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


_MOST_CHARACTERS = 4 * 2**20  # of a document
_MOST_PARTS = 16  # of a key with dots; those of a plan have 6
_PART = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_PART}[ \t]*+\.[ \t]*+){{{_MOST_PARTS}}}")


def json_of(content: str | bytes) -> Any:
    """The value. Raises ValueError for whatever is none."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def toml_of(text: str) -> dict[str, Any]:
    """The table. Raises tomllib.TOMLDecodeError, a ValueError, for whatever is none, and for what no document of ours is like."""
    if len(text) > _MOST_CHARACTERS:
        raise tomllib.TOMLDecodeError(f"it has {len(text):,} characters, expected at most {_MOST_CHARACTERS:,}")
    if found := _LONG_KEY.search(text):
        raise tomllib.TOMLDecodeError(f"{found[0][:40]}… is a key of more than {_MOST_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deep") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise tomllib.TOMLDecodeError(str(error)[:100]) from None
