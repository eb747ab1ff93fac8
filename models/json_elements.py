"""The elements of a JSON list, one by one: one that is nested too deep to be parsed must not make the others unreadable."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_BETWEEN = re.compile(r"\s*")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)  # or a string, in which brackets are letters


def elements(text: str, parse_int: Callable[[str], object]) -> Iterator[Any]:
    """Yield the elements of a list; None for one that is nested too deep.

    Raises ValueError where what is read one by one is no list; the list is expected to have no other fault.
    """
    decoder = json.JSONDecoder(parse_int=parse_int)
    at = _after_space(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        try:
            value, at = decoder.raw_decode(text, at)
        except RecursionError:
            value, at = None, _end_of_nested(text, at)
        yield value
        at = _after_comma(text, at)


def _end_of_nested(text: str, at: int) -> int:
    """Where the list or object that begins here ends. Raises ValueError where it does not."""
    depth = 0
    for found in _BRACKET.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    raise ValueError(f"what begins at character {at + 1} does not end")


def _after_comma(text: str, at: int) -> int:
    """Where the next element begins, or the list ends."""
    at = _after_space(text, at)
    if text[at : at + 1] == ",":
        return _after_space(text, at + 1)
    if text[at : at + 1] != "]":
        raise ValueError(f"expected a comma or the end of the list at character {at + 1}")
    return at


def _after_space(text: str, at: int) -> int:
    return at + len(_BETWEEN.match(text, at)[0])  # type: ignore[index]  # matches everywhere
