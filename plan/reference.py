"""Every key of a plan and of a policy, from the schemas themselves: the pages of docs and `cotune plan keys`.

`python -m cotune.plan.reference docs` writes the pages again; a test compares.

docs/plan.md and docs/policy.md: every key of a plan and of a policy, from the schemas themselves.

`python -m cotune.plan.reference docs` writes them again; a test compares.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cotune.errors import PlanError
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy
from cotune.storage.config_table import models_in

_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "length ≥ {}", "max_length": "length ≤ {}"}
_OF_TABLE = re.compile(r" \(the `\w+` table( of a plan)?\)")
_SHOWN = 3  # keys that a hint names


@dataclass(frozen=True)
class Key:
    """A key of a document.

    Attributes:
        name: Full, such as privacy.epsilon.
        type: In words.
        default: In words.
        bounds: Of a number or a length.
        meaning: The description.
        table: Whether it holds keys itself.
    """

    name: str
    type: str
    default: str
    bounds: str
    meaning: str
    table: bool


def list_keys(model: type[BaseModel]) -> list[Key]:
    """Return all keys of a document, a table's own after the table, in the order of the schema."""
    return list(_keys(model, ""))


def _keys(model: type[BaseModel], path: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        full = f"{path}.{name}" if path else name
        inner = _inner(field.annotation)
        yield build_key(full, field)
        for each in inner:
            yield from _keys(each, full)


def explain_key(name: str, model: type[BaseModel]) -> list[Key]:
    """Return the keys that a name may mean: a full one with those in its table, else every key with that ending.

    >>> from pydantic import create_model
    >>> Document = create_model("Document", local=(create_model("Local", learning_rate=(float, 0.1)), ...))
    >>> [key.name for key in explain_key("learning-rate", Document)]
    ['local.learning_rate']

    Raises:
        PlanError: For a name that no key has, with the nearest.
    """
    wanted = name.strip().replace("-", "_").casefold()
    keys = list_keys(model)
    found = [key for key in keys if key.name == wanted]
    found += [key for key in keys if found and key.name.startswith(f"{wanted}.")]
    found = found or [key for key in keys if key.name.endswith(f".{wanted}")]
    if not found:
        raise PlanError(f'there is no key "{name}"{_near(wanted, keys)} (`cotune plan keys` lists all)', code="plan.unknown_key")
    return found


def _near(wanted: str, keys: list[Key]) -> str:
    """Return a hint at the nearest key, by its full name or by its last part."""
    ends = [key.name.rpartition(".")[2] for key in keys]
    close = difflib.get_close_matches(wanted.rpartition(".")[2], ends, n=1, cutoff=0.6)
    names = [key.name for key, end in zip(keys, ends, strict=True) if end in close]
    whole = difflib.get_close_matches(wanted, [key.name for key in keys], n=1, cutoff=0.8)
    meant = list(dict.fromkeys([*whole, *names]))[:_SHOWN]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def list_tables(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (path, table) of a model and all tables nested in it, outer ones first."""
    yield path, model
    within = [
        (f"{path}.{name}" if path else name, inner)
        for name, field in model.model_fields.items()
        for inner in _inner(field.annotation)
    ]
    for place, inner in sorted(within, key=lambda each: bool(_places(each[1]))):
        yield from list_tables(inner, place)


def _places(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [inner for field in model.model_fields.values() for inner in _inner(field.annotation)]


def build_key(name: str, field: FieldInfo) -> Key:
    """Return a field of a schema as a key; a table without a description gets that of its schema."""
    inner = _inner(field.annotation)
    meaning = field.description or (_about(inner[0]) if inner else "")
    return Key(name, _type(field.annotation), _default(field), _limits(field), meaning, bool(inner))


def _about(model: type[BaseModel]) -> str:
    """Return the purpose of a table, without its name."""
    return _OF_TABLE.sub("", (model.__doc__ or "").strip().partition("\n")[0])


def _inner(annotation: Any) -> list[type[BaseModel]]:
    """Return the tables in a type, each once."""
    return list(dict.fromkeys(models_in(annotation)))


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    parts = get_args(annotation)
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


_WRITTEN = "<!-- Written by `python -m cotune.plan.reference docs`: change the schemas instead. -->"
_HEAD = "| key | type | default | bounds | meaning |\n|---|---|---|---|---|"


def render_pages() -> Mapping[str, str]:
    """Return file name -> content of the generated pages."""
    return {
        "plan.md": _page(
            Plan,
            "The plan",
            "A plan is a TOML file. Every key has its default here (`cotune plan keys` and `cotune plan explain KEY` say the"
            " same), `cotune plan new` prints a preset, and an unknown key is refused. Parts of the strategy, with their own"
            " keys, are in [strategies.md](strategies.md).",
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
    named: dict[type[BaseModel], list[str]] = {}  # a table that occurs in several places is described once
    for path, inner in list_tables(model):
        named.setdefault(inner, []).append(path)
    for inner, paths in named.items():
        lines += _table(inner, [path for path in paths if path])
    return "\n".join(lines) + "\n"


def _table(model: type[BaseModel], paths: list[str]) -> Iterator[str]:
    yield from ("", f"## {', '.join(f'`[{path}]`' for path in paths) or 'Top level'}", "")
    if paths:
        yield from ((model.__doc__ or "").strip().partition("\n")[0], "")
    yield _HEAD
    yield from (_row(build_key(name, field)) for name, field in model.model_fields.items())


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", key.type, key.default, key.bounds, key.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(folder: Path) -> None:
    """Write the generated pages into the folder of the documentation."""
    for name, content in render_pages().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
