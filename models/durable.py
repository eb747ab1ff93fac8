"""Files that a crash leaves either as they were or as they were to be, never in between."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
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
