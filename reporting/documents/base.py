"""The base of the models of JSON documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, KeysView, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _float_of(value: Any) -> Any:
    """An integer in JSON may be larger than any float: runs of before 0.1 kept whatever an organization stated."""
    return math.inf if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**1000 else value


Number = Annotated[float, BeforeValidator(_float_of)]


class Document(BaseModel):
    """A JSON object with known keys.

    Old runs stay readable, and what is read can be written again without a loss: keys that only another version knows are
    kept, and keys that are absent stay absent. Beside its attributes, a document can be read by the keys of its JSON, as the
    parsed file can:

    >>> class Size(Document):
    ...     up: int
    ...     down: int = 0
    >>> size = Size.model_validate({"up": 3, "unknown": 4})
    >>> (size.up, size["up"], size.down, dict(size))
    (3, 3, 0, {'up': 3, 'unknown': 4})
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=(), populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, without the keys that are absent."""
        return self.model_dump(exclude_unset=True, by_alias=True)

    def keys(self) -> KeysView[str]:
        """Return the keys that are present."""
        fields = type(self).model_fields
        known = [field.alias or name for name, field in fields.items() if name in self.model_fields_set]
        return dict.fromkeys([*known, *(self.model_extra or {})]).keys()

    def items(self) -> list[tuple[str, Any]]:
        """Return the keys that are present, with their values."""
        return [(key, self[key]) for key in self.keys()]

    def values(self) -> list[Any]:
        """Return the values of the keys that are present."""
        return [self[key] for key in self.keys()]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value by its key, or the default where the key is absent."""
        return self[key] if key in self.keys() else default

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        name = next((name for name, field in type(self).model_fields.items() if (field.alias or name) == key), key)
        return getattr(self, name)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(self.keys())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Document):
            return self.as_json() == other.as_json()
        return self.as_json() == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]
