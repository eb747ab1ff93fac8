"""Entities in tags, and how many of them a model finds whole: from the first to the last word, and of the right type.

Tags are read as the CoNLL-2000 evaluation does (and the seqeval package by default): B- begins an entity, I- continues one of its
type and begins one otherwise, E- ends one, S- is one by itself. A tag without a prefix continues one of its type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Entity = tuple[str, int, int]  # type, first word, last word
_OUTSIDE = "O"
_PREFIXES = ("B", "I", "E", "S")


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of one text, in order.

    >>> entities(["B-PER", "I-PER", "O", "B-LOC", "I-PER"])
    [('PER', 0, 1), ('LOC', 3, 3), ('PER', 4, 4)]
    """
    found: list[Entity] = []
    begun, kind, last = -1, "", ""
    for place, tag in enumerate([*tags, _OUTSIDE]):
        prefix, name = _parts(tag)
        goes_on = begun >= 0 and tag != _OUTSIDE and name == kind and prefix not in ("B", "S") and last not in ("E", "S")
        if begun >= 0 and not goes_on:
            found.append((kind, begun, place - 1))
            begun = -1
        if tag != _OUTSIDE and not goes_on:
            begun = place
        kind, last = name, prefix
    return found


def _parts(tag: str) -> tuple[str, str]:
    """(prefix, type); the prefix of a tag without one is I."""
    if tag == _OUTSIDE:
        return "", ""
    prefix, dash, name = tag.partition("-")
    if not dash and prefix in _PREFIXES:
        return prefix, ""
    return (prefix, name) if dash and prefix in _PREFIXES else ("I", tag)


def entity_quality(truth: Iterable[Sequence[str]], told: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Return precision, recall and F1 over all entities (micro), as the mean over the types (macro), and of each type.

    Args:
        truth: The tags of each text.
        told: As many, of the same texts.
    """
    there, given, right = Counter[str](), Counter[str](), Counter[str]()
    for true_tags, told_tags in zip(truth, told, strict=True):
        true_ones, told_ones = set(entities(true_tags)), set(entities(told_tags))
        there.update(kind for kind, _, _ in true_ones)
        given.update(kind for kind, _, _ in told_ones)
        right.update(kind for kind, _, _ in true_ones & told_ones)
    types: list[dict[str, Any]] = [
        {"type": kind, "entities": there[kind], "told": given[kind], **_figures(right[kind], given[kind], there[kind])}
        for kind in sorted(there | given)
    ]
    return {
        "entities": there.total(),
        "told": given.total(),
        "micro": _figures(right.total(), given.total(), there.total()),
        "macro": {key: sum(each[key] for each in types) / len(types) if types else 0.0 for key in ("precision", "recall", "f1")},
        "types": types,
    }


def _figures(right: int, told: int, there: int) -> dict[str, float]:
    return {
        "precision": right / told if told else 0.0,
        "recall": right / there if there else 0.0,
        "f1": 2 * right / (told + there) if told + there else 0.0,
    }
