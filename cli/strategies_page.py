"""The tables of docs/strategies.md, from what cotune's parts say of themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from cotune.strategies import catalogue

_MARK = "<!-- From here on the page is written by `cotune strategies --page docs/strategies.md`. -->"
_HEADINGS = {
    "weighting": "Weightings",
    "fusion": "Fusions",
    "server_optimizer": "Server optimisers",
    "client_term": "Client terms",
}


def renewed(page: str) -> str:
    """The page with new tables below its mark; what stands above it is kept."""
    return "\n".join([page.partition(_MARK)[0].rstrip(), "", _MARK, "", *_tables()]).rstrip() + "\n"


def _tables() -> Iterator[str]:
    yield from ("## Strategies by name", "")
    yield from _table(
        ("name", "parts", "adapters", "the server sees", "record-level ε", "client-level ε", "source"),
        [_recipe(recipe) for recipe in catalogue.recipes()],
    )
    parts = catalogue.parts(installed=False)
    for kind, heading in _HEADINGS.items():
        found = [part for part in parts if part["kind"] == kind]
        if found:
            yield from ("", f"## {heading}", "")
            columns = ("name", "what it does", "parameters", "the server sees", "organisations send", "they keep")
            yield from _table((*columns, "record-level ε", "client-level ε", "source"), [_part(part) for part in found])


def _recipe(recipe: dict[str, Any]) -> Sequence[str]:
    adapters = ", ".join(f"{key} = {value}" for key, value in recipe["lora"].items())
    return (f"`{recipe['name']}`", recipe["summary"], adapters, recipe["sees"], *_privacy(recipe), "; ".join(recipe["cite"]))


def _part(part: dict[str, Any]) -> Sequence[str]:
    parameters = "; ".join(_parameter(p) for p in part["parameters"])
    sends = ", ".join(part["sends"])
    return (f"`{part['name']}`", part["summary"], parameters, part["sees"], sends, part["state"], *_privacy(part), part["cite"])


def _parameter(parameter: dict[str, Any]) -> str:
    default = "" if parameter["required"] else f" = {json.dumps(parameter['default'], ensure_ascii=False)}"
    bounds = f", {parameter['bounds']}" if parameter["bounds"] else ""
    return f"`{parameter['name']}{default}` ({parameter['type']}{bounds})"


def _privacy(part: dict[str, Any]) -> Sequence[str]:
    return part["record_privacy"].partition(":")[0], part["client_privacy"].partition(":")[0]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
