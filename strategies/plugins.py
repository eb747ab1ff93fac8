"""Parts that come from elsewhere: a researcher's own file, `my_rules.py:my_fusion`, or an installed package's entry point.

A file is code: it is loaded on the coordinator's own machine alone, when its plan is made and when it runs there, and only
while its content is what the plan says (SHA-256). Clients read a plan without ever opening it. Client terms run at the
organisations: they come from cotune or from a package that is installed there, never from a file that a plan names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from cotune.models.errors import PlanError, nearest
from cotune.strategies.parts import FOLDERS, Kind, PartInfo, builtin, undecorated

__all__ = ["from_file", "is_file", "known", "load_file", "part_named", "pinned"]

_FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")


def is_file(name: str) -> bool:
    """Whether a name means a part in a file: `path/to/file.py:function`."""
    return _FILE.fullmatch(name) is not None


@cache
def known(kind: Kind) -> Mapping[str, PartInfo]:
    """The parts that can be named: those of cotune, and those of installed packages (entry points `cotune.fusions` …)."""
    found = dict(builtin(kind))
    for point in entry_points(group=f"cotune.{FOLDERS[kind]}"):
        if point.name not in found:
            found[point.name] = _info(kind, point.name, point.load())
    return found


def part_named(kind: Kind, name: str) -> PartInfo:
    """A part of cotune or of an installed package. Raises ValueError for an unknown name."""
    if name not in known(kind):
        words = kind.replace("_", " ").replace("optimizer", "optimiser")
        raise ValueError(f'unknown {words} "{name}"{nearest(name, known(kind))}')
    return known(kind)[name]


def from_file(kind: Kind, name: str, folder: Path) -> tuple[str, str, PartInfo]:
    """(absolute name, SHA-256, part) of `file.py:function`, the path being relative to `folder`. Runs the file. Raises
    PlanError.
    """
    if kind == "client_term":
        raise PlanError(
            f'client_term = "{name}" names a file: expected one of cotune or of a package that every organisation has'
            f" installed, as"
            " no client runs code that a plan brings"
        )
    match = _FILE.fullmatch(name)
    assert match is not None, "is_file said that it is one"
    path = (folder / match["path"]).resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}): expected a Python file with {match['name']} in it") from None
    digest = hashlib.sha256(content).hexdigest()
    return f"{path}:{match['name']}", digest, load_file(kind, f"{path}:{match['name']}", digest)


def pinned(strategy: Any, folder: Path) -> tuple[Any, dict[Kind, PartInfo]]:
    """The `strategy` table of a plan with every part in a file completed, and these parts. Raises PlanError or ValueError."""
    if not isinstance(strategy, Mapping):
        return strategy, {}
    table, infos = dict(strategy), dict[Kind, PartInfo]()
    for kind in FOLDERS:
        given = table.get(kind)
        part = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
        if not is_file(str(part.get("name"))):
            continue
        stated = part.pop("sha256", None)
        name, digest, infos[kind] = from_file(kind, str(part.pop("name")), folder)
        if stated not in (None, digest):
            raise PlanError(f"{name.rpartition(':')[0]} is not the file that the plan was made with: expected SHA-256 {stated}")
        table[kind] = {"name": name, "sha256": digest, **infos[kind].check(part)}
    if "fusion" in infos and "weighting" not in table and not infos["fusion"].needs.weights:
        table["weighting"] = "uniform"
    asked = {payload for info in infos.values() for payload in info.needs.sends}
    return ({**table, "sends": sorted({*table.get("sends", ()), *asked})} if asked else table), infos


def load_file(kind: Kind, name: str, sha256: str) -> PartInfo:
    """The part in a file, if the file is the one that the plan was made with. Runs the file. Raises PlanError."""
    match = _FILE.fullmatch(name)
    assert match is not None, "is_file said that it is one"
    path = Path(match["path"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}): expected the file that the plan names") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise PlanError(
            f"{path} is not the file that the plan was made with: restore it, or make a new plan with the changed one"
        )
    return _load(kind, path, match["name"], sha256)


@cache
def _load(kind: Kind, path: Path, name: str, sha256: str) -> PartInfo:
    spec = importlib.util.spec_from_file_location(f"cotune_plugin_{sha256[:16]}", path)
    assert spec is not None, "the name ends in .py"
    assert spec.loader is not None, "a file has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PlanError(
            f"{path} cannot be loaded ({type(error).__name__}: {error}): expected a Python file that can be"
        ) from error
    found = [n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
    if name not in found:
        raise PlanError(f'{path} has no "{name}"{nearest(name, found)}')
    return _info(kind, f"{path.name}:{name}", getattr(module, name))


def _info(kind: Kind, name: str, value: Any) -> PartInfo:
    info = getattr(value, "part", None)
    if not isinstance(info, PartInfo):
        return undecorated(kind, name, value)
    if info.kind != kind:
        raise PlanError(f"{name} is a {info.kind}, expected a {kind}: name it where the plan wants one")
    return info
