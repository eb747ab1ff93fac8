"""docs/plan.md and docs/policy.md: every key of a plan and of a policy, from the schemas themselves.

`python -m cotune.plan.reference docs` writes them anew; a test compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel

from cotune.plan.keys import Key, key_of, tables_of
from cotune.plan.schema import Plan
from cotune.privacy.policy import Policy

_WRITTEN = "<!-- Written by `python -m cotune.plan.reference docs`: change the schemas instead. -->"
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


def main(folder: Path) -> None:
    for name, content in pages().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
