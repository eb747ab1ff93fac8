"""TOML files that people edit: values are changed, and comments, order and formatting stay."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import tomlkit


def edit_toml(text: str, changes: Mapping[str, Any]) -> str:
    """Return a TOML document with other values for some keys.

    Args:
        text: The document.
        changes: Key -> value; a mapping changes keys of a table, which is added where it is missing; None removes a key.

    Example:
        >>> print(edit_toml('port = 1  # public', {"port": 2, "hosts": ["a"]}), end="")
        port = 2  # public
        hosts = ["a"]
    """
    document = tomlkit.parse(text)
    _update(document, changes)
    return tomlkit.dumps(document)


def _update(table: MutableMapping[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            if key not in table:
                table[key] = tomlkit.table()
            inner = table[key]
            assert isinstance(inner, MutableMapping), f"{key} is no table"
            _update(inner, value)
        elif value is None:
            del table[key]
        else:
            table[key] = value
