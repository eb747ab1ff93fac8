"""Load components from elsewhere: a researcher's own file, an installed package's entry point, or one of Flower's strategies.

`my_rules.py:my_fusion` names a file beside the plan. It is code: it runs only on the coordinator's machine, and only if its
content is what the plan pins (SHA-256); a run's folder keeps a copy beside the plan. `flwr.serverapp.strategy:Krum`, a class of
the installed Flower, runs only there, too. Clients read a plan without ever opening either. Client terms run at organizations:
they come from cotune or from a package that is installed there, never from a file that a plan names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from cotune.errors import PlanError, nearest
from cotune.strategies.registry import FOLDERS, ComponentInfo, Kind, get_builtin_components, get_kind_label, infer_component

_FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")
_FLOWER = re.compile(r"flwr(\.\w+)*:[A-Za-z_]\w*")
CLIENT_TERM_ADVICE = (
    "expected one of cotune, or of a package that every organization has installed, as no client runs code that a plan brings"
)
_read: dict[str, tuple[Path, bytes]] = {}  # by SHA-256: the files that this process has read


def is_file(name: str) -> bool:
    """Return whether a name means a component in a file: `path/to/file.py:function`."""
    return _FILE.fullmatch(name) is not None


def is_code(name: str) -> bool:
    """Return whether a name means code that only the coordinator loads: a component in a file, or one of Flower's strategies."""
    return is_file(name) or _FLOWER.fullmatch(name) is not None


# --- installed


def get_components(kind: Kind) -> Mapping[str, ComponentInfo]:
    """Return the components that plans can name: cotune's and those of installed packages (entry points `cotune.fusions` …)."""
    return dict(
        sorted({**{name: load_installed(kind, name) for name in _entry_points(kind)}, **get_builtin_components(kind)}.items())
    )


def get_component(kind: Kind, name: str) -> ComponentInfo:
    """Return a component of cotune or of an installed package, importing only that package.

    Raises:
        ValueError: If the name is unknown.
        PlanError: If the package cannot be loaded.
    """
    if name in get_builtin_components(kind):
        return get_builtin_components(kind)[name]
    if name not in _entry_points(kind):
        raise ValueError(
            f'unknown {get_kind_label(kind)} "{name}"{nearest(name, {**get_builtin_components(kind), **_entry_points(kind)})}'
        )
    return load_installed(kind, name)


def _entry_points(kind: Kind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"cotune.{FOLDERS[kind]}")}


@cache
def load_installed(kind: Kind, name: str) -> ComponentInfo:
    """Import the component of an entry point.

    Raises:
        PlanError: If its package cannot be imported, or the object is not such a component.
    """
    point = _entry_points(kind)[name]
    try:
        value = point.load()
    except Exception as error:
        raise PlanError(
            f'the {get_kind_label(kind)} "{name}" of the package {point.dist.name if point.dist else point.module} cannot be'
            f" loaded ({type(error).__name__}: {error}): repair or remove the package",
            code="plan.unusable_component",
        ) from error
    return component_from(kind, name, value)


# --- files


def register_file(name: str, folder: Path) -> str:
    """Read the file in `file.py:function` into this process's registry, without executing it.

    Args:
        name: The path may be relative to `folder`.
        folder: Of the plan.

    Returns:
        The SHA-256 of the file, by which the other functions here find it.

    Raises:
        PlanError: If the file cannot be read.
    """
    path = (folder / name.rpartition(":")[0]).resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(
            f"{path} cannot be read ({error.strerror}): expected the Python file that the plan names", code="plan.code_unreadable"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    _read[digest] = path, content
    return digest


def get_content(name: str, sha256: str) -> bytes:
    """Return the content of a registered file; raises PlanError if no file with that hash is registered."""
    return _content(name, sha256)[1]


def get_source(name: str, sha256: str) -> str:
    """Return `file.py:function` with the file's absolute path, for another process; raises PlanError as `get_content` does."""
    return f"{_content(name, sha256)[0]}:{name.rpartition(':')[2]}"


def load_object(name: str, sha256: str) -> Any:
    """Execute a registered file and return the function or class that `file.py:function` names.

    Raises:
        PlanError: If the file is not registered, cannot be executed, or does not define the name.
    """
    path, _ = _content(name, sha256)
    module = _run(sha256)
    wanted = name.rpartition(":")[2]
    found = [n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
    if wanted not in found:
        raise PlanError(f'{path} has no "{wanted}"{nearest(wanted, found)}', code="plan.code_lacks_name")
    return getattr(module, wanted)


def _content(name: str, sha256: str) -> tuple[Path, bytes]:
    if sha256 not in _read:
        raise PlanError(
            f"{name.rpartition(':')[0]} is not the file that the plan was made with (SHA-256 {sha256[:12]}…): put that one"
            " beside the plan, or make a new plan with the changed one",
            code="plan.code_changed",
        )
    return _read[sha256]


@cache
def _run(sha256: str) -> Any:
    """Return the module; it is executed once per content, however many copies of the file there are."""
    path, content = _read[sha256]
    spec = importlib.util.spec_from_file_location(f"cotune_plugin_{sha256[:16]}", path)
    assert spec is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    try:
        exec(
            compile(content, str(path), "exec", dont_inherit=True), vars(module)
        )  # the content that was hashed, whatever the file contains now
    except Exception as error:
        raise PlanError(
            f"{path} cannot be run ({type(error).__name__}: {error}): expected a Python file that can be", code="plan.code_failed"
        ) from error
    return module


# --- as a plan names them


def load_code(kind: Kind, name: str, sha256: str) -> ComponentInfo:
    """Execute the code that a name means (see `is_code`) and return its component.

    Args:
        kind: What the plan uses it as.
        name: `file.py:function`, or a class of Flower's.
        sha256: Of the file, which must be registered; ignored for Flower's classes.

    Raises:
        PlanError: If it is a client term, or the code cannot be used as that kind of component.
    """
    if kind == "client_term":
        raise PlanError(f'client_term = "{name}" names code: {CLIENT_TERM_ADVICE}', code="plan.client_term_is_code")
    if is_file(name):
        return component_from(kind, Path(name).name, load_object(name, sha256))
    if kind != "fusion":
        raise PlanError(
            f'{kind} = "{name}" names a strategy of Flower\'s, which is whole: expected strategy = "{name}"',
            code="plan.wrong_component_kind",
        )
    from cotune.strategies.flower import load_flower_strategy

    return load_flower_strategy(name)


def component_from(kind: Kind, name: str, value: Any) -> ComponentInfo:
    """Return the declaration of a function or class.

    Args:
        kind: What the plan uses it as.
        name: What the plan calls it.
        value: One without a decorator gets the declaration of `infer_component`.

    Raises:
        PlanError: If the value cannot be a component of that kind.
    """
    info = getattr(value, "component", None)
    if isinstance(info, ComponentInfo):
        if info.kind != kind:
            raise PlanError(
                f'"{name}" is a {get_kind_label(info.kind)}: expected a {get_kind_label(kind)} in its place',
                code="plan.wrong_component_kind",
            )
        return info
    if kind == "fusion" and inspect.isclass(value):
        from cotune.strategies.flower import build_flower_component, is_flower_class

        if is_flower_class(value):
            return build_flower_component(name, value)
    if inspect.isclass(value) == (kind in ("weighting", "fusion")):
        wanted = (
            "a function, or a strategy of Flower's" if kind == "fusion" else "a function" if kind == "weighting" else "a class"
        )
        raise PlanError(
            f'"{name}" is a {type(value).__name__}: expected {wanted} with @{kind} on it', code="plan.wrong_component_kind"
        )
    return infer_component(kind, name, value)


def pin_code(strategy: Any, folder: Path) -> tuple[Any, dict[Kind, ComponentInfo]]:
    """Complete the components of a plan that are code, by executing them: their hashes, parameters, and what they need.

    Files are named without their folder: the path is private to the coordinator, and a run keeps the file beside its plan.

    Args:
        strategy: The plan's `strategy` table; other values are returned unchanged.
        folder: Of the plan.

    Returns:
        (the completed table, kind -> component that is code).

    Raises:
        PlanError: If code cannot be read, executed or used, or differs from the hash in the plan.
        ValueError: If parameters are invalid.
    """
    if not isinstance(strategy, Mapping):
        return strategy, {}
    table = dict(strategy)
    infos = dict[Kind, ComponentInfo]()
    for kind in FOLDERS:
        given = table.get(kind)
        part = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
        if is_code(str(part.get("name"))):
            table[kind], infos[kind] = _completed(kind, part, folder)
    _check_names([table[kind] for kind in infos if "sha256" in table[kind]])
    if "fusion" in infos and "weighting" not in table and not infos["fusion"].needs.weights:
        table["weighting"] = "uniform"
    asked = {payload for info in infos.values() for payload in info.needs.sends}
    return ({**table, "sends": sorted({*table.get("sends", ()), *asked})} if asked else table), infos


def _check_names(parts: Sequence[Mapping[str, Any]]) -> None:
    """Refuse two files of the same name with different content, as a run keeps all files in one folder."""
    digests: dict[str, str] = {}
    for part in parts:
        file = part["name"].rpartition(":")[0]
        if digests.setdefault(file, part["sha256"]) != part["sha256"]:
            raise PlanError(
                f"the plan names two files {file} with different content: expected one, or two names", code="plan.code_ambiguous"
            )


def _completed(kind: Kind, part: dict[str, Any], folder: Path) -> tuple[dict[str, Any], ComponentInfo]:
    name = str(part.pop("name"))
    stated = part.pop("sha256", None)
    pin: dict[str, str] = {}
    if is_file(name) and kind != "client_term":
        pin = {"sha256": register_file(name, folder)}
        if stated not in (None, pin["sha256"]):
            raise PlanError(
                f"{name.rpartition(':')[0]} is not the file that the plan was made with: expected SHA-256 {stated}",
                code="plan.code_changed",
            )
    info = load_code(kind, name, pin.get("sha256", ""))
    parameters = info.check(part)
    if hasattr(info.build, "rehearse"):
        info.build.rehearse(parameters)
    return {"name": Path(name).name, **pin, **parameters}, info
