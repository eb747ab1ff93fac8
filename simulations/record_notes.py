"""What a simulation says about its records: how many do not count and why, and classes that look alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cotune.data.class_names import find_missing_markers, group_similar_spellings, shown
from cotune.data.dataset import Dataset
from cotune.data.records import Records
from cotune.data.skipped_records import KEPT, count_cut_texts, format_left_out
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan

LeftOut = Mapping[Path | None, Mapping[str, int]]
"""File -> how many of its records do not count in training, or not in full, by the reason."""

_SHOWN = 5  # groups of classes that are named
_FILES = 10  # that are named one by one

# more classes than the first, with fewer records than the second in the mean
_MANY = 20
_RECORDS_OF_A_CLASS = 5
_counted: dict[tuple[str, str, int], Mapping[str, int]] = {}  # (records, model, length) -> how many texts are cut


def count_left_out(plan: Plan, records: Mapping[Path | None, Records], model: TrainableModel) -> LeftOut:
    """Return how many records of each file do not count in training, or not in full, by the reason."""
    return {file: _losses(plan, each, model) for file, each in records.items()}


def _losses(plan: Plan, records: Records, model: TrainableModel) -> Mapping[str, int]:
    found: Counter[str] = Counter()
    for reasons in (records.skipped, _cut(records, model), _copies(plan, records)):
        found.update(reasons)
    return {reason: count for reason, count in found.items() if count}


def build_notes(plan: Plan, left_out: LeftOut, records: Mapping[Path | None, Records]) -> list[str]:
    """Return the sentences about the records of a simulation."""
    total = sum(map(len, records.values()))
    return [*_lines(left_out, records), *alike_notes(plan.labels), *_many_classes(plan, total)]


def holder_notes(holders: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a sentence for each of several tasks whose head one organization alone trains, or none. holders: task -> who."""
    for task, names in holders.items():
        if len(names) == 1:
            yield (
                f"the head of the task {task} is trained by {names[0]} alone: nothing is averaged into it, so that it is that"
                " organization's own release"
            )
        if not names:
            yield f"no organization holds the task {task}: its head stays as it was drawn"


def _lines(left_out: LeftOut, records: Mapping[Path | None, Records]) -> Iterator[str]:
    """What is left out: of several files each that loses anything, by its name, those that lose most first."""
    if len(records) == 1:
        ((file, held),) = records.items()
        yield from _line(left_out.get(file, {}), len(held), "")
        return
    losing = sorted((file for file in left_out if left_out[file]), key=lambda file: -sum(left_out[file].values()))
    named = losing if len(losing) <= _FILES + 1 else losing[:_FILES]
    for file in named:
        yield from _line(left_out[file], len(records[file]), Path(records[file].source).name)
    if others := losing[len(named) :]:
        together = sum((Counter(left_out[file]) for file in others), Counter[str]())
        yield from _line(together, sum(len(records[file]) for file in others), f"{len(others)} other files")


def _line(reasons: Mapping[str, int], records: int, source: str) -> Iterator[str]:
    line = format_left_out(reasons, records, source)
    if line is not None:
        yield line


def alike_notes(labels: Sequence[str]) -> Iterator[str]:
    """Warnings where classes differ in spelling alone, and where one may be no class."""
    groups = group_similar_spellings(labels)
    if groups:
        named = "; ".join(" and ".join(map(shown, group)) for group in groups[:_SHOWN])
        more = f", and {len(groups) - _SHOWN} more such groups" if len(groups) > _SHOWN else ""
        yield (
            f"classes differ in spelling alone, and are trained as different ones: {named}{more}; if they are one class, give it"
            " one spelling in all files"
        )
    missing = find_missing_markers(labels)
    if missing:
        yield (
            f"trained as a class, and perhaps a missing label: {' and '.join(map(shown, missing))}; if it is none, leave these"
            " fields empty in all files"
        )


def _many_classes(plan: Plan, records: int) -> Iterator[str]:
    """A warning where the column of labels looks like one of numbers, dates or names."""
    if plan.task == "sequence-classification" and len(plan.labels) > max(_MANY, records // _RECORDS_OF_A_CLASS):
        yield (
            f"the column {plan.data.label!r} has {len(plan.labels):,} classes for {records:,} records, as one of numbers or dates"
            " would: if another one says the class, name it with --label"
        )


def _copies(plan: Plan, records: Records) -> Mapping[str, int]:
    """Records that a promise leaves out; without one, the copies that are trained on."""
    if plan.privacy == "none":
        return {KEPT: len(records) - len(set(records.identities))}
    rows = np.arange(len(records))
    return Dataset(((records, rows),), plan.labels, plan.task).bound_contributions(plan.privacy, plan.seed).dropped


def _cut(records: Records, model: TrainableModel) -> Mapping[str, int]:
    """Counted once for the same records and model, as comparisons prepare many runs."""
    loaded = model.loaded
    key = records.fingerprint, loaded.folder.content_hash, loaded.max_length
    if key not in _counted:
        _counted[key] = count_cut_texts(model, records.inputs)
    return _counted[key]
