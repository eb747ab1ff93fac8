"""Git LFS keeps large files elsewhere, and leaves a few lines in their place where it was not asked to fetch them."""

from __future__ import annotations

from pathlib import Path

_START = b"version https://git-lfs.github.com/spec/"
_LARGEST = 1024  # bytes of a pointer (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a pointer in place of its content."""
    return start.startswith(_START)


def first_lfs_pointer(files: dict[str, Path]) -> str | None:
    """Return the name of the first file that is a pointer; None without one. What cannot be read is told by who loads it."""
    for name, file in files.items():
        try:
            if file.stat().st_size <= _LARGEST and is_lfs_pointer(file.read_bytes()):
                return name
        except OSError:
            continue
    return None
