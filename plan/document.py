"""A plan as it is written: a preset or a TOML file with overrides, as plain values that nobody has checked yet.

Nothing here imports torch, so that a plan or a file that is not there is named before anybody waits for it.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cotune.models.errors import PlanError, nearest
from cotune.models.nested import toml_of


def preset_names() -> list[str]:
    """The plans that come with cotune."""
    folder = resources.files("cotune.plan") / "presets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def preset_summary(name: str) -> str:
    """What a preset is for: the first sentence of its comment. Raises PlanError for an unknown name."""
    lines = preset_text(name).splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(lambda each: each.startswith("#"), lines))
    return re.split(r"[.:] ", comment, maxsplit=1)[0].rstrip(".")


def preset_text(name: str) -> str:
    """A preset as TOML, comments included. Raises PlanError for an unknown name."""
    if name not in preset_names():
        raise PlanError(f'there is neither a preset nor a file "{name}"{nearest(name, preset_names())}')
    return (resources.files("cotune.plan") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read_document(source: str | Path = "tweets", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the tables of a TOML file or a preset, with `key=value` overrides such as "privacy.epsilon=3". Raises PlanError."""
    path = Path(source)
    if path.suffix == ".toml" or path.exists():
        text, name = _read(path), path.stem
    else:
        text, name = preset_text(str(source)), str(source)
    try:
        table = toml_of(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{source} is not valid TOML ({error}): expected a plan as `cotune plan new tweets` prints it") from None
    table.setdefault("name", name)
    for override in overrides:
        _override(table, override)
    return table


def overrides_alone(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tables that hold what overrides say, and nothing else. Raises PlanError for one that is not understood."""
    table: dict[str, Any] = {}
    for override in overrides:
        _override(table, override)
    return table


def folder_of(source: str | Path) -> Path:
    """Return what paths of a plan's own code are relative to."""
    path = Path(source)
    return path.parent if path.suffix == ".toml" else Path()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # as editors on Windows write it
    except FileNotFoundError:
        raise PlanError(
            f"the plan {path} does not exist: expected a TOML file; `cotune plan new tweets > my.toml` makes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan {path} cannot be read ({error}): expected a TOML file in UTF-8") from None


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise PlanError(f'the override "{text}" is not understood: expected key=value, such as privacy.epsilon=3')
    here: Any = table
    for part in path[:-1]:
        if isinstance(here, list):
            here = _item(here, part, text)
            continue
        if path[0] == "strategy" and isinstance(here.get(part), str):
            here[part] = {"recipe" if part == "strategy" else "name": here[part]}
        if not isinstance(here.get(part), dict | list):
            here[part] = {}
        here = here[part]
    if isinstance(here, list):
        _item(here, path[-1], text)
        here[int(path[-1])] = value_of(value)
    else:
        here[path[-1]] = value_of(value)


def _item(items: list[Any], part: str, text: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise PlanError(f'the override "{text}" is not understood: expected a number from 0 to {len(items) - 1} for {part}')
    return items[int(part)]


def value_of(text: str) -> Any:
    """A TOML value where it reads as one, else the text itself."""
    try:
        return toml_of(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        return text.strip()
