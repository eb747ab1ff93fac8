"""A name that nobody knows and that a file here defines: how a plan names a rule of one's own. Files are read, none is run."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cotune.strategies.config import RECIPES
from cotune.strategies.plugins import get_components
from cotune.strategies.registry import FOLDERS, get_kind_label

_MAX_FILES = 100  # of a folder that are looked into
_MOST_BYTES = 1_000_000
_FROM_FILES = tuple(kind for kind in FOLDERS if kind != "client_term")


def check_own_names(strategy: Any, folder: Path) -> None:
    """Check the names in the `strategy` of a plan, as it was written, before they are looked up.

    Args:
        strategy: A name, or a table.
        folder: What the plan's own files are relative to.

    Raises:
        ValueError: For a name that is unknown, and is that of a rule in a file here: it says how the rule is named.
    """
    table = {"recipe": strategy} if isinstance(strategy, str) else strategy
    if not isinstance(table, Mapping):
        return
    for place in ("recipe", *_FROM_FILES):
        given = table.get(place)
        name = given.get("name") if isinstance(given, Mapping) else given
        what = "strategy" if place == "recipe" else get_kind_label(place)
        if isinstance(name, str) and (found := find_own_name(name, folder)):
            raise ValueError(f'unknown {what} "{name}": a rule in a file is named with its file, as "{found}"')


def find_own_name(name: str, folder: Path) -> str | None:
    """Return `my_rules.py:name` where a Python file in the folder defines what cotune does not know by that name; else None.

    >>> find_own_name("fedavg", Path()), find_own_name("no such rule", Path())
    (None, None)
    """
    if not name.isidentifier() or name in RECIPES:
        return None
    files = [file for file in _files(name, folder) if _defines(file, name)]
    if not files or any(name in get_components(kind) for kind in FOLDERS):
        return None
    return f"{files[0].name}:{name}"


def _files(name: str, folder: Path) -> Iterator[Path]:
    """The file of that name, then the others."""
    yield folder / f"{name}.py"
    with contextlib.suppress(OSError):
        yield from sorted(folder.glob("*.py"))[:_MAX_FILES]


def _defines(file: Path, name: str) -> bool:
    """Whether the file holds a function or a class of that name, at its top."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            return False
        found = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError):
        return False
    return any(isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == name for each in found)
