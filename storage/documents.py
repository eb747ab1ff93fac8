"""JSON and TOML that somebody else has written: what is nested too deep for Python's readers is malformed like anything else.

Python's reader of TOML notes every beginning of a key with dots: one of 100,000 parts, 200 kB, takes 40 GB of memory.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

_MOST_CHARACTERS = 4 * 2**20  # of a document
_MOST_PARTS = 16  # of a key with dots; those of a plan have 6
_PART = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_PART}[ \t]*+\.[ \t]*+){{{_MOST_PARTS}}}")


def parse_json(content: str | bytes) -> Any:
    """The value. Raises ValueError for whatever is none."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The table. Raises tomllib.TOMLDecodeError, a ValueError, for whatever is none, and for what no document of ours is like."""
    if len(text) > _MOST_CHARACTERS:
        raise tomllib.TOMLDecodeError(f"it has {len(text):,} characters, expected at most {_MOST_CHARACTERS:,}")
    if found := _LONG_KEY.search(text):
        raise tomllib.TOMLDecodeError(f"{found[0][:40]}… is a key of more than {_MOST_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deep") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise tomllib.TOMLDecodeError(str(error)[:100]) from None
