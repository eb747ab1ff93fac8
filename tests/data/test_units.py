"""Units of privacy: which records of a unit count is decided by that unit alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.config import DataConfig, TaskName
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.data.records import Records
from cotune.data.types import normalize_text
from cotune.privacy.config import RecordPrivacy
from tests.support.datasets import tagged, write_images
from tests.support.failures import fails_with

PEOPLE = RecordPrivacy(unit="patient_id", max_records=3)
Row = tuple[str, str, str]  # text, label, whose


def dataset(*files: list[Row]) -> Dataset:
    parts = []
    for rows in files:
        texts, labels, whose = zip(*rows, strict=True) if rows else ((), (), ())
        records = Records(texts, labels, "records", units=tuple(map(normalize_text, whose)))
        parts.append((records, np.arange(len(rows))))
    return Dataset(tuple(parts), ("x", "y"))


def kept(held: Dataset) -> list[tuple[str, int]]:
    return sorted(zip(held.inputs(), held.targets, strict=True))


rows = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("xy"), st.sampled_from(["1", "2", "3"])), max_size=25)


@given(rows, st.integers(0, 3), st.integers(1, 4))
def test_a_unit_has_no_influence_on_another(table: list[Row], seed: int, most: int) -> None:
    """With and without the records of a person, the others' that count are the same."""
    privacy = RecordPrivacy(unit="patient_id", max_records=most)
    of_others = [row for row in table if row[2] != "1"]
    whole = dataset(table).bound_contributions(privacy, seed)
    without = dataset(of_others).bound_contributions(privacy, seed)
    own = sum(row[2] == "1" for row in table)
    assert len(whole) - len(without) == min(own, most)
    by_person = dict(zip(whole.get_unit_identities(), whole.units, strict=True))
    for unit, group in zip(without.get_unit_identities(), without.units, strict=True):
        found = [kept_row(whole, row) for row in by_person[unit]]
        assert sorted(found) == sorted(kept_row(without, row) for row in group)


def kept_row(held: Dataset, row: int) -> tuple[str, int]:
    return held.inputs()[row], held.targets[row]


@given(rows, st.permutations(range(25)), st.integers(0, 3))
def test_the_order_of_a_file_is_no_matter(table: list[Row], order: list[int], seed: int) -> None:
    shuffled = [table[i] for i in order if i < len(table)]
    one = dataset(table).bound_contributions(PEOPLE, seed)
    other = dataset(shuffled[:9], shuffled[9:]).bound_contributions(PEOPLE, seed)
    assert kept(one) == kept(other)
    assert one.get_unit_identities() == other.get_unit_identities()
    assert [len(group) for group in one.units] == [len(group) for group in other.units]


@given(rows)
def test_every_record_that_counts_belongs_to_one_unit(table: list[Row]) -> None:
    held = dataset(table).bound_contributions(PEOPLE, seed=7)
    assert sorted(row for group in held.units for row in group) == list(range(len(held)))
    assert all(1 <= len(group) <= 3 for group in held.units)
    assert len(set(held.get_unit_identities())) == len(held.units) == len({row[2] for row in table})
    assert kept(held.bound_contributions(PEOPLE, seed=7)) == kept(held)


@given(rows, st.tuples(st.sampled_from("abcdef"), st.sampled_from("xy"), st.just("9")))
def test_one_row_changes_the_records_that_count_by_one(table: list[Row], more: Row) -> None:
    """A text with two labels counts in neither: with the first one kept, a row could put another label in its place."""
    before, after = (dataset(rows).bound_contributions(RecordPrivacy(), seed=7) for rows in (table, [*table, more]))
    assert len(set(kept(before)) ^ set(kept(after))) <= 1
    assert all(len(group) == 1 for group in after.units)


def test_another_spelling_is_no_other_record() -> None:
    """Of a text that is written in two ways, or has two labels, no record counts; of plain copies one."""
    table = [("a b", "x", ""), ("a  b", "x", ""), ("c", "x", ""), ("c", "x", ""), ("d", "x", ""), ("d", "y", "")]
    assert kept(dataset(table).bound_contributions(RecordPrivacy(), 7)) == [("c", 0)]


def test_seeds_choose_differently() -> None:
    table = [(f"text {i}", "x", "p") for i in range(40)]
    held = dataset(table)
    assert len({tuple(held.bound_contributions(PEOPLE, seed).inputs()) for seed in range(20)}) > 10


def test_without_a_promise_every_row_is_by_itself() -> None:
    held = dataset([("a", "x", "1"), ("a", "x", "1")])
    assert held.bound_contributions("none", 7) is held
    assert held.units == [[0], [1]]


def test_spellings_of_one_person() -> None:
    for other in ("P-7 ", "p-7", "Ｐ-７", "p-7\u200b", "\x07P-7", "p-7\ufe0f", "p-7."):
        assert normalize_text(other) == normalize_text("p-7")
    assert normalize_text("p-7") != normalize_text("p-8")


def test_a_person_and_a_text_are_never_the_same() -> None:
    """A patient called 17, and the text 17."""
    table = [("17", "x", "17")]
    of_records, of_people = (dataset(table).bound_contributions(privacy, 7) for privacy in (RecordPrivacy(), PEOPLE))
    assert of_records.get_unit_identities() == of_records.identities()
    assert not set(of_people.get_unit_identities()) & set(of_records.get_unit_identities())


def test_records_without_the_column(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\na,x\nb,y\n")
    records = read_records(DataConfig(source=str(file)))
    held = Dataset(((records, np.arange(2)),), ("x", "y"))
    with fails_with("data.missing_unit", "patient_id"):
        held.bound_contributions(PEOPLE, 7)


# --- reading ---------------------------------------------------------------------------------------------------------

CONTENTS = {
    "a.csv": 'who,text,label\nP1,a,x\n" p1",b,y\n,c,x\n2,d,x\n',
    "a.jsonl": "\n".join(
        json.dumps({"who": who, "text": text, "label": label})
        for who, text, label in [("P1", "a", "x"), (" p1", "b", "y"), (None, "c", "x"), (2, "d", "x")]
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_whose_the_records_of_a_file_are(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(CONTENTS[name])
    records = read_records(DataConfig(source=str(file), unit="who"))
    assert (records.inputs, records.units) == (("a", "b", "d"), ("p1", "p1", "2"))
    assert records.skipped == {"missing who": 1}
    assert records.select([2, 0]).units == ("2", "p1")
    assert read_records(DataConfig(source=str(file))).units == ()


def test_units_in_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    file = tmp_path / "a.parquet"
    Dataset.from_dict({"who": [1.0, 2.0, None], "text": ["a", "b", "c"], "label": [0, 1, 0]}).to_parquet(str(file))
    records = read_records(DataConfig(source=str(file), unit="who"))
    assert (records.units, records.skipped) == (("1", "2"), {"missing who": 1})


def test_a_value_that_is_no_name_is_missing(tmp_path: Path) -> None:
    """A single record must not stop the others: that would tell of it."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"who": [1], "text": "a", "label": "x"}\n{"who": 2, "text": "b", "label": "x"}\n')
    records = read_records(DataConfig(source=str(file), unit="who"))
    assert (records.units, records.skipped) == (("2",), {"missing who": 1})


def test_a_file_without_the_column(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\na,x\n")
    with fails_with("data.missing_column", "who", "data.unit"):
        read_records(DataConfig(source=str(file), unit="who"))


def test_a_folder_of_images_has_no_column(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 6)
    with fails_with("data.missing_column", "patient_id"):
        read_records(DataConfig(source=str(folder), unit="patient_id"), task="image-classification")


@pytest.mark.parametrize("task", ["token-classification", "image-classification"])
def test_units_of_other_tasks(tmp_path: Path, task: TaskName) -> None:
    file = tmp_path / "a.jsonl"
    if task == "image-classification":
        write_images(tmp_path / "images", 4)
        paths = sorted((tmp_path / "images").rglob("*.*"))
        rows = [
            {"who": i // 2, "image": str(path.relative_to(tmp_path)), "label": path.parent.name} for i, path in enumerate(paths)
        ]
    else:
        rows = [{"who": i // 2, "text": words, "label": tags} for i, (words, tags) in enumerate(tagged(4))]
    file.write_text("\n".join(map(json.dumps, rows)))
    records = read_records(DataConfig(source=str(file), unit="who"), task=task)
    held = Dataset(((records, np.arange(4)),), tuple(records.label_counts()), task).bound_contributions(PEOPLE, 7)
    assert records.units == ("0", "0", "1", "1")
    assert sorted(map(sorted, held.units)) == [[0, 1], [2, 3]]


def test_duplicates_are_those_of_one_person(tmp_path: Path) -> None:
    """If a text of one person could take the place of another's, each would have an influence on the other."""
    file = tmp_path / "a.csv"
    file.write_text("who,text,label\n1,a,x\n1,a,x\n2,a,x\n2,b,x\n2,b,y\n")
    records = read_records(DataConfig(source=str(file), unit="who", deduplicate=True))
    assert list(zip(records.units, records.inputs, strict=True)) == [("1", "a"), ("2", "a")]
    assert records.skipped == {"duplicate": 1, "conflicting labels": 2}


def test_the_unit_has_a_column_of_its_own() -> None:
    for column in ("text", "label", "image"):
        with pytest.raises(ValueError, match="unit"):
            DataConfig(source="a.csv", unit=column)
