"""docs/plan.md and docs/policy.md: every key of a plan and of a policy, from the schemas themselves; and `known_keys.py`.

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

from cotune.models.table import models_in
from cotune.plan.keys import Key, key_of, tables_of
from cotune.plan.schema import Plan
from cotune.privacy.policy import Policy

__all__ = ["known_keys", "pages"]

_WRITTEN = "<!-- Written by `python -m cotune.plan.reference docs`: change the schemas instead. -->"
_MARK = "# Written by `python -m cotune.plan.reference docs`: change the schemas instead."
_HEAD = "| key | type | default | bounds | meaning |\n|---|---|---|---|---|"


def pages() -> Mapping[str, str]:
    """File name -> content."""
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
    named: dict[type[BaseModel], list[str]] = {}  # a table that has several places is described once
    for path, inner in tables_of(model):
        named.setdefault(inner, []).append(path)
    for inner, paths in named.items():
        lines += _table(inner, [path for path in paths if path])
    return "\n".join(lines) + "\n"


def _table(model: type[BaseModel], paths: list[str]) -> Iterator[str]:
    yield from ("", f"## {', '.join(f'`[{path}]`' for path in paths) or 'Top level'}", "")
    if paths:
        yield from ((model.__doc__ or "").strip().partition("\n")[0], "")
    yield _HEAD
    yield from (_row(key_of(name, field)) for name, field in model.model_fields.items())


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", key.type, key.default, key.bounds, key.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def known_keys() -> str:
    """Return the module by which slips are found before the schemas, which need torch, are imported: key -> words, if only those.

    What is below `strategy` is not in it, as its parts have keys of their own.
    """
    lines = [
        '"""The keys of a plan and of a policy, with the words that a key may be where it may be nothing else."""',
        "",
        _MARK,
        "",
    ]
    for name, model in (("PLAN", Plan), ("POLICY", Policy)):
        lines.append(f"{name}: dict[str, tuple[str, ...]] = {{")
        lines += [f"    {json.dumps(key)}: {_tuple(words)}," for key, words in _known(model, "")]
        lines.append("}")
    return "\n".join(lines) + "\n"


def _known(model: type[BaseModel], path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, field in model.model_fields.items():
        full = f"{path}.{name}" if path else name
        yield full, _words(field.annotation)
        if full != "strategy":
            for inner in dict.fromkeys(models_in(field.annotation)):
                yield from _known(inner, full)


def _words(annotation: Any) -> tuple[str, ...]:
    """The texts that a value may be; none where it may be any, or a number that is written as one."""
    if get_origin(annotation) is Literal:
        return tuple(word for word in get_args(annotation) if isinstance(word, str))
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            found += _words(member)
        elif not (member is NoneType or get_origin(member) is tuple or models_in(member)):
            return ()
    return tuple(found)


def _tuple(words: tuple[str, ...]) -> str:
    return f"({json.dumps(words[0])},)" if len(words) == 1 else f"({', '.join(map(json.dumps, words))})"


def main(folder: Path) -> None:
    for name, content in pages().items():
        (folder / name).write_text(content, encoding="utf-8")
    Path(__file__).with_name("known_keys.py").write_text(known_keys(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
