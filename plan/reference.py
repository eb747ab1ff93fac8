"""docs/plan.md and docs/policy.md: every key of a plan and of a policy, from the schemas themselves.

`python -m cotune.plan.reference docs` writes them anew; a test compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cotune.plan.schema import Plan
from cotune.privacy.policy import Policy

__all__ = ["pages"]

_WRITTEN = "<!-- Written by `python -m cotune.plan.reference docs`: change the schemas instead. -->"
_HEAD = "| key | type | default | bounds | meaning |\n|---|---|---|---|---|"
_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "length ≥ {}", "max_length": "length ≤ {}"}


def pages() -> Mapping[str, str]:
    """File name -> content."""
    return {
        "plan.md": _page(
            Plan,
            "The plan",
            "A plan is a TOML file. Every key has its default here, `cotune plan new` prints a preset, and an unknown key is"
            " refused. Parts of the strategy, with their own keys, are in [strategies.md](strategies.md).",
        ),
        "policy.md": _page(
            Policy,
            "The policy",
            "An organization's own rules, in `policy.toml` of its site: they overrule every plan. `cotune client policy SITE"
            " --set RULE=VALUE` changes one.",
        ),
    }


def _page(model: type[BaseModel], title: str, words: str) -> str:
    lines = [f"# {title}", "", _WRITTEN, "", words]
    named: dict[type[BaseModel], list[str]] = {}  # a table that has several places is described once
    for path, inner in _tables(model, ""):
        named.setdefault(inner, []).append(path)
    for inner, paths in named.items():
        lines += _table(inner, [path for path in paths if path])
    return "\n".join(lines) + "\n"


def _tables(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Where a table is, and the table: the model itself, and every one in it, those further in last."""
    yield path, model
    within = [
        (f"{path}.{name}" if path else name, inner)
        for name, field in model.model_fields.items()
        for inner in _inner(field.annotation)
    ]
    for place, inner in sorted(within, key=lambda each: bool(_places(each[1]))):
        yield from _tables(inner, place)


def _places(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [inner for field in model.model_fields.values() for inner in _inner(field.annotation)]


def _table(model: type[BaseModel], paths: list[str]) -> Iterator[str]:
    yield from ("", f"## {', '.join(f'`[{path}]`' for path in paths) or 'Top level'}", "")
    if paths:
        yield from ((model.__doc__ or "").strip().partition("\n")[0], "")
    yield _HEAD
    yield from (_row(name, field) for name, field in model.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _type(field.annotation), _default(field), _limits(field), field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _inner(annotation: Any) -> list[type[BaseModel]]:
    """The tables in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(model for part in get_args(annotation) for model in _inner(part)))


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(part)}`" for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts if part is not NoneType)
    if origin in (tuple, list):
        return f"list of {_type(parts[0])}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel | dict)):
        return "table"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Path: "path"}
    if annotation in names:
        return names[annotation]
    return _type(parts[0]) if parts else getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own"
    return "absent" if value is None else f"`{json.dumps(value, ensure_ascii=False, default=str)}`"


def _limits(field: FieldInfo) -> str:
    found = [(name, getattr(rule, name)) for rule in field.metadata for name in _BOUNDS if getattr(rule, name, None) is not None]
    return ", ".join(_BOUNDS[name].format(f"{value:,.12g}") for name, value in found)


def main(folder: Path) -> None:
    for name, content in pages().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
