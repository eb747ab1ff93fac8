"""Slips in the keys of a plan or a policy, found without torch: whoever mistypes one must not wait for it.

The keys stand in `plan.known_keys`, which `python -m cotune.plan.reference docs` writes from the schemas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from cotune.models.errors import PlanError, nearest
from cotune.models.table import meant_key, shown_value
from cotune.plan.known_keys import PLAN, POLICY

__all__ = ["check_keys", "check_rules"]

_EXPLAINED = ("lora.method",)  # of which the schema says why some words are not among them
_KNOWN: dict[str, Mapping[str, tuple[str, ...]]] = {"plan": PLAN, "policy": POLICY}


def check_keys(table: Mapping[str, Any], document: Literal["plan", "policy"]) -> None:
    """Check that every key of a document is one, and that a word that stands for one of several is among them.

    Whatever else may be wrong, the schema says later. Raises PlanError with the sentence that the schema would have.
    """
    for key, value in _entries(table, "", _KNOWN[document]):
        _check(key, value, document)


def check_rules(changes: Iterable[str]) -> None:
    """Check the full names of rules of a policy that are to be changed. Raises PlanError."""
    rules = [key for key in POLICY if "." in key]
    for key in changes:
        if key not in rules:
            raise PlanError(f'the policy has no rule "{key}"{nearest(key, rules)}')


def _entries(table: Mapping[str, Any], within: str, known: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    """Key by key with the full names, those of a table after it; what may have keys of any name is not looked into."""
    for name, value in table.items():
        if name.isdigit() and isinstance(value, Mapping):  # an override of one stage in a list
            yield from _entries(value, within, known)
            continue
        key = f"{within}.{name}" if within else name
        yield key, value
        if any(other.startswith(f"{key}.") for other in known):
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, Mapping):
                    yield from _entries(inner, key, known)


def _check(key: str, value: Any, document: str) -> None:
    known = _KNOWN[document]
    within, _, name = key.rpartition(".")
    if key not in known:
        paths = [tuple(other.split(".")) for other in known if not other.startswith("train.")]
        beside = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == within]
        raise PlanError(f'the {document} has an unknown key "{key}"{meant_key(name, paths, beside)}')
    words = known[key]
    if words and key not in _EXPLAINED and isinstance(value, str) and value not in words:
        named = " or ".join(", ".join(map(repr, part)) for part in (words[:-1], words[-1:]) if part)
        raise PlanError(f"the {document} has {key} = {shown_value(value)}: input should be {named}")
