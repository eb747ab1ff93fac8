"""Labeled records in memory, and the one order of their class names."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cotune.data.class_names import is_shown, shown
from cotune.data.types import Input, Label, class_names_in, content_bytes, record_identity
from cotune.errors import DataError, nearest

SHOWN = 5  # how many unknown classes an error names


@dataclass(frozen=True)
class Records:
    """Labeled inputs, in the order of their file: texts and classes, words and tags, or images and classes.

    Attributes:
        inputs: Texts, words or images.
        labels: Classes or tags, as `class_name` has them (1.0 reads "1", True reads "true").
        source: The name to show.
        skipped: How many records of the file were left out, by the reason ("blank text", "missing label", "duplicate", …).
        units: Whose each record is, by its plain name (see `types.normalize_text`); empty where no column says it.
    """

    inputs: tuple[Input, ...] = field(repr=False)  # private: never in a log by accident
    labels: tuple[Label, ...] = field(repr=False)
    source: str
    skipped: Mapping[str, int] = field(default_factory=dict, hash=False)
    units: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.inputs)

    def select(self, rows: Iterable[int]) -> Records:
        """The records at `rows`, in that order; what the file had to skip stays with the whole."""
        chosen = [int(row) for row in rows]
        inputs = tuple(self.inputs[row] for row in chosen)
        labels = tuple(self.labels[row] for row in chosen)
        return Records(inputs, labels, self.source, units=tuple(self.units[row] for row in chosen) if self.units else ())

    def label_counts(self) -> dict[str, int]:
        """How many records (with tags: how many words) each class has, in the order of `check_labels`."""
        return self.label_counts_in(_ordered(name for label in self.labels for name in class_names_in(label)))

    def label_counts_in(self, names: Sequence[str]) -> dict[str, int]:
        """The same in the order of `names`, with 0 for a class that no record has."""
        counts = Counter(name for label in self.labels for name in class_names_in(label))
        return {name: counts[name] for name in names}

    @cached_property
    def identities(self) -> tuple[bytes, ...]:
        """What a ledger knows each record by, see `record_identity`."""
        return tuple(record_identity(given) for given in self.inputs)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of inputs, labels and units in order: the same for the same records, whatever file held them."""
        digest = hashlib.sha256()
        for values in zip(self.inputs, self.labels, *([self.units] if self.units else []), strict=True):
            for value in values:
                data = content_bytes(value)
                digest.update(len(data).to_bytes(8, "big") + data)  # lengths keep ("ab", "c") and ("a", "bc") apart
        return digest.hexdigest()


def check_labels(records: Records, known: Sequence[str] | None) -> tuple[str, ...]:
    """The class names in their one order: numeric if all are integers, otherwise alphabetical.

    They are those of `known` if it is given (the records may lack some, as one organization's often do), otherwise
    those of the records. Raises DataError for fewer than two classes, or for a class in the records that `known` lacks.
    """
    found = _ordered(name for label in records.labels for name in class_names_in(label))
    names = found if known is None else _ordered(known)
    if len(names) < 2:
        got = f"{records.source} holds" if known is None else "the plan lists"
        raise DataError(
            f"{got} the class {', '.join(map(shown, names)) or 'of nothing'} only, and a classifier needs two or more:"
            " check data.label, or list the classes of all organizations in the plan",
            code="data.too_few_classes",
        )
    strange = [name for name in found if name not in set(names)]
    if strange:
        named = ", ".join(shown(name) for name in strange[:SHOWN])
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        raise DataError(
            f"{records.source} holds classes that the plan does not list ({named}{more}):"
            f" rename them, or drop their records{nearest(strange[0], filter(is_shown, names))}",
            code="data.unknown_class",
        )
    return names


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in distinct):
        distinct.sort(key=int)
    return tuple(distinct)
