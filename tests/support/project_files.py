"""The files of the project, without what builds, runs and environments leave in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
_OUTSIDE = {"build", "dist", "runs"}  # at the top level; and hidden folders anywhere


def find_project_files(*suffixes: str) -> Iterator[Path]:
    """Yield the files with one of the suffixes, in order, as paths below the top level."""
    for file in sorted(TOP.rglob("*")):
        inner = file.relative_to(TOP)
        hidden = any(part.startswith(".") for part in inner.parts)
        if file.suffix in suffixes and not hidden and inner.parts[0] not in _OUTSIDE and file.is_file():
            yield inner
