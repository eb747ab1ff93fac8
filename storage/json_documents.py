"""Documents on disk: JSON that cotune keeps, and JSON and TOML that others have written.

What others have written may be hostile: a document that is nested too deep for Python's readers is malformed like any other, and
a key with many dots is refused before Python's TOML reader sees it (one of 100,000 parts, 200 kB, takes it 40 GB of memory).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter

from cotune.errors import RunError
from cotune.storage.files import atomic_write

T = TypeVar("T")


@lru_cache(maxsize=64)
def _adapter(schema: Hashable) -> TypeAdapter[Any]:
    """To make one takes longer than to read a document."""
    return TypeAdapter(cast(Any, schema))


class JsonDocument(Generic[T]):
    """A JSON document that cotune keeps on disk: read and validated as a whole, replaced as a whole.

    Args:
        file: Where it is.
        schema: What it holds: a pydantic model, or another type that pydantic knows, such as `dict[str, int]`.
        advice: What to do when it is damaged, as the end of the error.

    >>> from tempfile import mkdtemp
    >>> strikes = JsonDocument(Path(mkdtemp()) / "strikes.json", dict[str, int], advice="remove it to begin counting again")
    >>> strikes.read() is None
    True
    >>> strikes.write({"hospital-a": 2})
    >>> strikes.read()
    {'hospital-a': 2}
    """

    def __init__(self, file: Path, schema: type[T], *, advice: str = "remove it") -> None:
        self.file = file
        self._schema: TypeAdapter[T] = _adapter(cast(Hashable, schema))
        self._advice = advice

    def read(self) -> T | None:
        """Return what the document holds; None where there is no file.

        Raises:
            RunError: The document cannot be read or does not fit its schema (`run.damaged_document`).
        """
        try:
            return self._schema.validate_json(self.file.read_bytes())
        except FileNotFoundError:
            return None
        except Exception as error:  # a validator may raise anything
            raise RunError(
                f"{self.file} is damaged ({type(error).__name__}): {self._advice}", code="run.damaged_document"
            ) from None

    def write(self, value: T, *, durable: bool = True) -> None:
        """Replace the document; when this returns, it survives a power cut, or without `durable` only the end of the process.

        Raises:
            OSError: The file cannot be written; the former document is still there.
        """
        atomic_write(self.file, self._schema.dump_json(value, indent=1), durable=durable)


_MAX_CHARACTERS = 4 * 2**20  # of a document
_MAX_KEY_PARTS = 16  # of a key with dots; those of a plan have 6
_PART = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_PART}[ \t]*+\.[ \t]*+){{{_MAX_KEY_PARTS}}}")


def parse_json(content: str | bytes) -> Any:
    """Parse JSON that others have written.

    Raises:
        ValueError: It is not JSON, or nested too deep.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML that others have written.

    Raises:
        tomllib.TOMLDecodeError: A ValueError: it is not TOML, or larger or deeper than any document of cotune.
    """
    if len(text) > _MAX_CHARACTERS:
        raise tomllib.TOMLDecodeError(f"it has {len(text):,} characters, expected at most {_MAX_CHARACTERS:,}")
    if found := _LONG_KEY.search(text):
        raise tomllib.TOMLDecodeError(f"{found[0][:40]}… is a key of more than {_MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deep") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise tomllib.TOMLDecodeError(str(error)[:100]) from None
