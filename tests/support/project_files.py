"""The files of the project, without what builds, runs and environments leave in its folder."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
_OUTSIDE = {"build", "dist", "runs"}  # at the top level; and hidden folders anywhere


@cache
def find_project_files(*suffixes: str) -> tuple[Path, ...]:
    """Return the files with one of the suffixes, in order, as paths below the top level."""
    return tuple(file for file in _project_files() if file.suffix in suffixes)


@cache
def _project_files() -> tuple[Path, ...]:
    """Folders that are no part of the project are not entered: an environment holds more files than the project."""
    found = []
    for folder, inner, names in os.walk(TOP):
        at_top = Path(folder) == TOP
        inner[:] = [name for name in inner if not name.startswith(".") and not (at_top and name in _OUTSIDE)]
        found += [Path(folder, name).relative_to(TOP) for name in names if not name.startswith(".")]
    return tuple(sorted(found))
