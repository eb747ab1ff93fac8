"""The files of the project, without what builds, runs and environments leave in its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
_OUTSIDE = {"build", "dist", "runs"}  # at the top level; and hidden folders anywhere


def find_project_files(*suffixes: str) -> Iterator[Path]:
    """Yield the files with one of the suffixes, in order, as paths below the top level."""
    for folder, inner, files in os.walk(TOP):
        here = Path(folder).relative_to(TOP)
        inner[:] = sorted(name for name in inner if not name.startswith(".") and not (here == Path() and name in _OUTSIDE))
        yield from (here / name for name in sorted(files) if Path(name).suffix in suffixes and not name.startswith("."))
