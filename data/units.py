"""Units of privacy: whom a promise is made to, which of their records count, and how a ledger knows them again.

A unit is a record, or all records that have the same value in a column, such as the records of one patient. Everything that is
decided here about a unit is decided by that unit's own records, so that no unit has an influence on another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from cotune.data.types import Input, Label, content_bytes

RECORD = "record"  # the name of the unit that is one record
_BYTES = 16  # of an identity


class UnitRule(Protocol):
    """What a promise says of its unit (see `privacy.accounting.RecordPrivacy`)."""

    @property
    def unit(self) -> str:
        """RECORD, or the name of another unit."""

    @property
    def max_records(self) -> int | None:
        """How many records of a unit count at most; None for RECORD."""


def person_identity(name: str) -> bytes:
    """16 bytes that stay the same in every export: SHA-256 over a plain name, apart from those of records."""
    return hashlib.sha256(b"cotune unit\0" + name.encode("utf-8", "surrogatepass")).digest()[:_BYTES]


def group_positions(names: Iterable[Hashable]) -> list[list[int]]:
    """The positions of equal names, in the order in which the names come first."""
    groups: dict[Hashable, list[int]] = {}
    for position, name in enumerate(names):
        groups.setdefault(name, []).append(position)
    return list(groups.values())


def choose_counting(unit: bytes, records: Sequence[tuple[Input, Label]], most: int, seed: int) -> list[int]:
    """The positions of the at most `most` records of a unit that count, ascending.

    They have the smallest SHA-256 over the seed, the unit and their own content: an order that looks random, and in which other
    units have no say.

    Args:
        unit: Identity of the unit.
        records: Its records.
        most: The most records that count (`privacy.max_records`).
        seed: Of the plan.
    """
    if len(records) <= most:
        return list(range(len(records)))
    ranks = [_rank(seed, unit, *record) for record in records]
    return sorted(sorted(range(len(records)), key=lambda position: (ranks[position], position))[:most])


def _rank(seed: int, unit: bytes, given: Input, label: Label) -> bytes:
    digest = hashlib.sha256(b"cotune choice\0" + seed.to_bytes(8, "big"))
    for data in (unit, content_bytes(given), content_bytes(label)):
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def are_same_record(records: Sequence[tuple[Input, Label]]) -> bool:
    """Whether records that are known as one are one, to the letter: the same input and the same label.

    Of a text with two labels, or written in two ways, no record counts. If one of them did, a single row of a file could put
    another in its place, which changes a sum of gradients by twice what one record may.
    """
    return len({(content_bytes(given), content_bytes(label)) for given, label in records}) == 1
