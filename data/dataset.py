"""Which records somebody holds: rows of one or several files, as a small JSON document beside its row numbers.

An organization's site and the server's test set are both described this way. Features are computed per file, not per holder, so
that they are the same no matter who asks and computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from cotune.bounded_cache import BoundedCache
from cotune.data.config import DataConfig, TaskName, has_labels
from cotune.data.multi_task import keep_tasks
from cotune.data.record_reading import read_records
from cotune.data.records import Records
from cotune.data.tasks.task import get_task
from cotune.data.types import Input, Label, class_names_in, get_stratum
from cotune.data.units import RECORD, UnitRule, are_same_record, choose_counting, group_positions, person_identity
from cotune.errors import DataError

_SURPLUS = "more than max_records of their unit"


# which of some identities are in another collection than the named one (see `privacy.ledger.Ledger.elsewhere`)
FindElsewhere = Callable[[Sequence[bytes], str], set[bytes]]


class FileSlice(BaseModel):
    """Rows of one file; `rows`: the name of a .npy file with their numbers beside the document; None: all of them.

    `tasks`: of several tasks, those whose labels are held; empty: all that `data` has a column for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Path | None
    rows: str | None = None
    tasks: tuple[str, ...] = ()


class DatasetManifest(BaseModel):
    """The document."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: TaskName = "sequence-classification"  # what the records are read as
    data: DataConfig
    portions: tuple[FileSlice, ...]
    collection: str = ""  # which total their charges count against (see privacy/ledger/charges.py); "": every one

    @classmethod
    def read(cls, file: Path, labels: tuple[str, ...], *, lenient: bool = False) -> Dataset:
        """Return the data set that the document describes, with its records read.

        Args:
            file: The document.
            labels: The plan's classes in the order of the head.
            lenient: Whether a record of another class is one without a loss. A real organization must not fail by the classes of
                its records: whether it does would reveal something about single ones.

        Raises:
            DataError: For a document or records that cannot be read.
        """
        try:
            content = file.read_bytes()
            document = _parse_manifest(content)
        except (OSError, ValidationError) as error:
            raise DataError(
                f"{file} cannot be read ({type(error).__name__}): expected a description of the records, such as"
                ' {"data": {"source": "records.csv", "text": "text", "label": "label"}, "portions": [{"path": null}]}',
                code="data.damaged_manifest",
            ) from None
        found = [read_records(document.data, p.path, document.task, lenient=lenient, labels=labels) for p in document.portions]
        rows = [_read_rows(file, portion) for portion in document.portions]
        key = content, tuple(rows), tuple(map(id, found)), labels, lenient
        return _kept.find(key, lambda: document._build(file, found, rows, labels, lenient))

    def _build(
        self, file: Path, found: Sequence[Records], rows: Sequence[bytes], labels: tuple[str, ...], lenient: bool
    ) -> Dataset:
        parts = []
        for portion, records, content in zip(self.portions, found, rows, strict=True):
            held = keep_tasks(records, portion.tasks) if portion.tasks else records
            parts.append((held, _parse_rows(file, portion, content, len(records))))
        every = tuple(task for task, _ in self.data.tasks)
        held_tasks = {task for portion in self.portions for task in portion.tasks or every}
        tasks = tuple(task for task in every if task in held_tasks)
        of_files = tuple(found)
        return Dataset(tuple(parts), labels, self.task, lenient, collection=self.collection, tasks=tasks, of_files=of_files)


@lru_cache(maxsize=1024)
def _parse_manifest(content: bytes) -> DatasetManifest:
    """The document of a text; many are read again and again."""
    return DatasetManifest.model_validate_json(content)


_Key = tuple[bytes, tuple[bytes, ...], tuple[int, ...], tuple[str, ...], bool]


def _read_rows(file: Path, portion: FileSlice) -> bytes:
    """The file of the portion's row numbers; nothing where it is all rows. Raises DataError."""
    if portion.rows is None:
        return b""
    try:
        return (file.parent / portion.rows).read_bytes()
    except OSError as error:
        raise _unreadable_rows(file, portion, error) from None


def _unreadable_rows(file: Path, portion: FileSlice, error: Exception) -> DataError:
    return DataError(
        f"{file.parent / str(portion.rows)} cannot be read ({type(error).__name__}): expected row numbers",
        code="data.damaged_manifest",
    )


def _parse_rows(file: Path, portion: FileSlice, content: bytes, records: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The portion's row numbers. Raises DataError when they cannot be read, or are not rows of the file."""
    if portion.rows is None:
        return np.arange(records)
    try:
        rows = np.asarray(np.load(BytesIO(content), allow_pickle=False), dtype=np.int64)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable_rows(file, portion, error) from None
    if rows.size and not 0 <= rows.min() <= rows.max() < records:
        raise DataError(
            f"{file} names row {rows.max()} of a file with {records} usable records: expected the file as it was when the records"
            " were handed out; restore it, or start a new run",
            code="data.changed",
        )
    return rows


def write_manifest(
    file: Path,
    data: DataConfig,
    portions: list[tuple[Path | None, Any]],
    task: TaskName = "sequence-classification",
    held: Sequence[tuple[str, ...]] = (),
) -> None:
    """Writes the document and the row numbers beside it. held: of several tasks, those of each portion; empty: all of all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for i, (path, rows) in enumerate(portions):
        np.save(file.parent / f"{file.stem}-rows-{i}.npy", np.asarray(rows, dtype=np.int64), allow_pickle=False)
        written.append(FileSlice(path=path, rows=f"{file.stem}-rows-{i}.npy", tasks=held[i] if held else ()))
    document = DatasetManifest(task=task, data=data, portions=tuple(written))
    file.write_text(document.model_dump_json(indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Dataset:
    """Records held, in a fixed order; labels as class numbers in the plan's order.

    Attributes:
        parts: The records of each file, and the rows of it that are held.
        labels: Class names in the order of the head.
        task: What the records are read as.
        lenient: Whether a record of a class that the plan lacks is one without a loss, instead of an error.
        unit: Whom a promise is made to, see `bound_contributions`; None: nobody, and every row stands for itself.
        whole: The same before contributions were bounded.
        collection: The organization's own collection that the records are in.
        dropped: How many rows of the files are not held, by the reason.
        tasks: Of several tasks, those that the holder says it has labels of: public, and no matter which labels are there.
        of_files: All records of the files, as they were read.
    """

    parts: tuple[tuple[Records, np.ndarray[Any, np.dtype[np.int64]]], ...]
    labels: tuple[str, ...]
    task: TaskName = "sequence-classification"
    lenient: bool = False
    unit: str | None = None
    whole: Dataset | None = field(default=None, repr=False)
    collection: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict, hash=False)
    tasks: tuple[str, ...] = ()
    of_files: tuple[Records, ...] = field(default=(), repr=False, compare=False)

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.parts)

    @cached_property
    def targets(self) -> list[Any]:
        """What a model is to predict for each record (see `Task.targets`).

        Raises:
            DataError: For a class that the plan does not have.
        """
        if self.unknown and not self.lenient:
            raise DataError(
                f"the data have the classes {', '.join(self.unknown[:5])}, which the plan does not list:"
                f" expected {', '.join(self.labels)}",
                code="data.unknown_class",
            )
        return get_task(self.task).targets(self.held_labels, self.labels)

    @cached_property
    def unknown(self) -> list[str]:
        """The classes of the records that the plan does not list."""
        if not has_labels(self.task):
            return []
        held = {name for label in self.held_labels for name in class_names_in(label)}
        return sorted(held - set(self.labels))

    @property
    def truth(self) -> list[Any]:
        """All that a model is to predict: the target of each record, or every entry of those that are several."""
        return [entry for target in self.targets for entry in (target if isinstance(target, tuple) else (target,))]

    def bound_contributions(self, privacy: UnitRule | Literal["none"], seed: int) -> Dataset:
        """The records that count under a promise, and the units that it is made to; without a promise, the data set unchanged.

        Of a unit from a column, at most `privacy.max_records` records count, chosen by the seed and their own content. Where each
        record is a unit, records of equal identity are one, of which one counts, and none if they differ (see `units.agree`):
        then one row of a file, added or removed, changes the records that count by one or none.
        Guarantee: which records of a unit count is decided by the records of that unit and the seed alone.
        Raises DataError where the unit is from a column and the records were read without one.
        """
        if privacy == "none":
            return self
        question = privacy.unit, privacy.max_records, seed
        if question not in self._bounded:
            self._bounded[question] = self._bound(privacy, seed)
        return self._bounded[question]

    @cached_property
    def _bounded(self) -> dict[tuple[str, int | None, int], Dataset]:
        """What was answered: the same records and the same promise have the same answer."""
        return {}

    def _bound(self, privacy: UnitRule, seed: int) -> Dataset:
        whole = replace(self, unit=privacy.unit, whole=self)
        inputs = self.inputs()
        labels = self.held_labels
        identities = whole.get_unit_identities()
        kept = np.zeros(len(self), dtype=bool)
        dropped = Counter[str]()
        for unit, group in zip(identities, whole.units, strict=True):
            if len(group) == 1:
                kept[group] = True
                continue
            records = [(inputs[row], labels[row]) for row in group]
            if privacy.unit == RECORD and not are_same_record(records):
                dropped["copies that differ"] += len(group)
                continue
            counting = choose_counting(unit, records, privacy.max_records or 1, seed)
            kept[[group[i] for i in counting]] = True
            dropped[_SURPLUS if privacy.unit != RECORD else "copies"] += len(group) - len(counting)
        return whole._only(kept, dropped)

    def apart(self, elsewhere: FindElsewhere, privacy: UnitRule | Literal["none"]) -> Dataset:
        """Without the units that are in another of the organization's collections.

        They contribute nothing here, like a record that cannot be read: nobody sees from outside that they are in the file.
        """
        if not self.collection:
            return self
        ours = self if privacy == "none" else replace(self, unit=privacy.unit)
        kept = np.ones(len(self), dtype=bool)
        known = elsewhere(ours.get_unit_identities(), self.collection)
        for unit, group in zip(ours.get_unit_identities(), ours.units, strict=True):
            if unit in known:
                kept[group] = False
        return self._only(kept, {"in another collection": int((~kept).sum())})

    def _only(self, kept: np.ndarray[Any, np.dtype[np.bool_]], dropped: Mapping[str, int]) -> Dataset:
        """Some of the rows, in their order; how many were dropped now, by reason."""
        ends = np.cumsum([len(rows) for _, rows in self.parts])
        held = zip(self.parts, np.split(kept, ends[:-1]), strict=True)
        parts = tuple((records, rows[counts]) for (records, rows), counts in held)
        return replace(self, parts=parts, dropped=dict(Counter(self.dropped) + Counter(dropped)))

    def left_out(self) -> dict[str, int]:
        """How many rows of the files contribute nothing to training, by the reason; for the organization's own eyes."""
        found = Counter(self.dropped)
        for records, _ in self.parts:
            found.update(records.skipped)
        if has_labels(self.task):
            known = set(self.labels)
            does = get_task(self.task)
            found["label unknown to the plan"] = sum(does.is_unknown(label, known) for label in self.held_labels)
        return {reason: count for reason, count in found.items() if count}

    def _unit_names(self, unit: str) -> list[str]:
        if any(len(records.units) != len(records) for records, _ in self.parts):
            raise DataError(
                f"the plan makes its promise to each {unit} (privacy.unit), and nothing says whose the records are: expected the"
                " name of their column in data.unit",
                code="data.missing_unit",
            )
        return [records.units[int(i)] for records, rows in self.parts for i in rows]

    @cached_property
    def units(self) -> list[list[int]]:
        """The row numbers (0 … n-1) of each unit, ascending; the units by their identity: a file's order is no matter.

        Without a promise every row is by itself, in order.
        """
        if self.unit is None:
            return [[row] for row in range(len(self))]
        return sorted(group_positions(self._unit_keys), key=lambda group: self._unit_keys[group[0]])

    @cached_property
    def _unit_identities(self) -> list[bytes]:
        return [self._unit_keys[group[0]] for group in self.units]

    def get_unit_identities(self) -> list[bytes]:
        """16 bytes for each of `units`, in their order, by which a ledger knows it again; those of records without a promise."""
        return self._unit_identities

    def linked_identities(self) -> list[bytes]:
        """Of units that are more than a record: their records, whether they count or not.

        By them a ledger links a data set to those that were charged under another unit.
        """
        return [] if self.unit in (None, RECORD) or self.whole is None else self.whole.identities()

    @cached_property
    def _unit_keys(self) -> list[bytes]:
        """The identity of each row's unit."""
        if self.unit in (None, RECORD):
            return self.identities()
        return [person_identity(name) for name in self._unit_names(self.unit)]

    @cached_property
    def weights(self) -> list[float]:
        """What each row counts for, so that every unit counts for one: one over the records of its unit."""
        sizes = {row: len(group) for group in self.units for row in group}
        return [1 / sizes[row] for row in range(len(self))]

    def label_counts(self) -> dict[str, float]:
        """How many units each class has, every unit counting for one, parted among its records; of tags by their `get_stratum`.

        Disclosing these counts with privacy relies on it: one unit changes them by one at most, in L1 and so in L2.
        """
        counts = dict.fromkeys(self.labels, 0.0)
        for label, weight in zip(self.held_labels, self.weights, strict=True):
            if (name := get_stratum(label)) in counts:
                counts[name] += weight
        return counts

    @property
    def held_labels(self) -> list[Label]:
        """The label of each record, as it was read."""
        return [records.labels[int(i)] for records, rows in self.parts for i in rows]

    def inputs(self) -> list[Input]:
        return [records.inputs[int(i)] for records, rows in self.parts for i in rows]

    def identities(self) -> list[bytes]:
        """16 bytes for each record, by which a ledger knows it again (see `types.record_identity`)."""
        return [records.identities[int(i)] for records, rows in self.parts for i in rows]


# data sets by all that decides what they hold, with what was found out about them; each keeps the records whose identity is in
# its key. Sizes are rows: of a larger data set, no other is kept.
_kept: BoundedCache[_Key, Dataset] = BoundedCache(max_entries=1024, max_size=2**18, size_of=len)
