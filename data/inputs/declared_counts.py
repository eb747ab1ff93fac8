"""Bound the numbers in settings that anyone may have written, before transformers makes a list of as many.

A `config.json` of a hundred bytes that says 10⁹ layers or labels, or a `tokenizer_config.json` that says 10⁹ extra tokens, would
take all memory of the machine that loads it, before anything compares it with weights or vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cotune.errors import ModelError
from cotune.printable import printable

_PARTS = re.compile(r"(layers?|blocks?|block_count|depths?|groups|group_num|stages|networks|functions)$")
_MOST_PARTS = 10_000  # more than any model of transformers has of anything that is built of layers
_CHOICES = re.compile(r"(labels|classes|experts|expert_count)$")
_MOST_CHOICES = 100_000
_MOST_IN_LISTS = 10_000_000  # numbers of tokens, among others
_NO_COUNTS = re.compile(r"max|length|vocab|_id$")  # of a tokenizer's settings


def check_declared_counts(settings: Any) -> None:
    """Check the numbers of layers, labels and the like.

    Args:
        settings: Of `config.json`, with those of its parts.

    Raises:
        ModelError: If one is larger than any model has.
    """
    for key, number, is_in_list in _find_numbers(settings):
        if (most := _find_limit(key, is_in_list)) is not None and number > most:
            raise _too_many("config.json", key, number, most)


def check_tokenizer_counts(folder: Path) -> None:
    """Check the numbers in the settings of a tokenizer, such as of extra tokens. What is no JSON is left to who reads it.

    Raises:
        ModelError: If one is larger than any tokenizer has.
    """
    file = folder / "tokenizer_config.json"
    try:
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    for key, number, _ in _find_numbers(settings):
        if number > _MOST_CHOICES and not _NO_COUNTS.search(key):
            raise _too_many(file.name, key, number, _MOST_CHOICES)


def _find_numbers(settings: Any) -> Iterator[tuple[str, float, bool]]:
    """Yield (the key under which it stands, each whole number, whether in a list), however deep."""
    left = [("", settings, False)]
    while left:
        key, value, is_in_list = left.pop()
        if isinstance(value, Mapping):
            left += [(str(own), part, False) for own, part in value.items()]
        elif isinstance(value, list):
            left += [(key, part, True) for part in value]
        elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            yield key, value, is_in_list


def _find_limit(key: str, is_in_list: bool) -> int | None:
    if _PARTS.search(key):
        return _MOST_PARTS
    if _CHOICES.search(key):
        return _MOST_CHOICES
    return _MOST_IN_LISTS if is_in_list else None


def _too_many(file: str, key: str, number: float, most: int) -> ModelError:
    return ModelError(
        f"the base model's {file} says {printable(key)[:60]} = {str(number)[:40]}: expected at most {most:,}; download the folder"
        " again, or use another base model",
        code="model.damaged_config",
    )
