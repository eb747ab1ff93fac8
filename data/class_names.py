"""A class has one name, whatever format or program wrote it; and names that differ in spelling alone are pointed out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache

_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")  # zero-width characters and directions
_JOINERS = "\u200c\u200d"  # inside a word they make another one
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0", re.ASCII)
_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?", re.ASCII)
_MISSING = ("nan", "nat", "null", "<na>", "n/a", "#n/a", "#na", "#value!", "#ref!")  # "none" and "NA" are classes, too
_MAX_LENGTH = 40  # characters of a name that is shown as one
_MAX_WORDS = 5  # in it


@lru_cache(maxsize=4096)
def class_name(word: str) -> str:
    """Return a label as every format gives it: decided by the label alone, never by what other records have.

    Composed (NFC), with single spaces, without zero-width characters; a truth value as Parquet and JSON write it (True: true),
    and a whole number that went through a float as a whole one (1.0: 1). Codes stay as they are: 02, 1.50, 250.00.

    >>> [class_name(word) for word in ("True", "1.0", " good\\u200b", "1.50", "02")]
    ['true', '1', 'good', '1.50', '02']
    """
    name = _cleaned(word)
    while (again := _cleaned(name)) != name:  # letters that meet once nothing is between them are composed, too
        name = again
    return name


def _cleaned(word: str) -> str:
    seen = _UNSEEN.sub(lambda found: found[0] if found[0] in _JOINERS else "", unicodedata.normalize("NFC", word))
    name = " ".join(seen.strip(_JOINERS).split()).strip(_JOINERS)
    if name.casefold() in ("true", "false"):
        return name.casefold()
    whole = _WHOLE.fullmatch(name)
    return name if whole is None else whole[1] if whole[1] != "-0" else "0"


def group_similar_spellings(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of names that a reader would take for one: of other case, form, width, spaces, or final zeros."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(_spelling(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def find_missing_markers(names: Iterable[str]) -> list[str]:
    """Return the names that programs write where a value is missing; in CSV and Excel they are words as any other."""
    return [name for name in names if name.casefold() in _MISSING]


def _spelling(name: str) -> str:
    form = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    form = " ".join(re.sub(r"[\s_-]+", " ", _UNSEEN.sub("", form)).split()) or name
    return str(Decimal(name).normalize()) if _NUMBER.fullmatch(name) else form


def shown(name: str) -> str:
    """Return a class as an error may show it: a long one may be a record's text, in a column that holds no classes."""
    return repr(name) if is_shown(name) else f"one of {len(name)} characters"


def is_shown(name: str) -> bool:
    """Whether a class is short enough to be one."""
    return len(name) <= _MAX_LENGTH and len(name.split()) <= _MAX_WORDS
