from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cotune.errors import DataError
from cotune.simulations.prepare import prepare
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.simulations import NewPlan

NAMES = ("St. Mary's", "Klinik Nord", "Hôpital / Est")
COLUMN = {"partition": "column:hospital", "min_examples": 5}


def write(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "label", "hospital"), *rows])
    return path


def hospital(i: int) -> str:
    return NAMES[0 if i % 6 < 3 else 1 if i % 6 < 5 else 2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "all.csv", [(f"{text} {i}", label, hospital(i)) for i, (text, label) in enumerate(sentences(240))])


def test_each_organization_holds_the_records_of_its_value(toy_plan: NewPlan, file: Path) -> None:
    found = prepare(toy_plan(data={"source": str(file)}, simulation=COLUMN), "cpu")
    with file.open(encoding="utf-8", newline="") as stream:
        held = [row["hospital"] for row in csv.DictReader(stream)]
    whose = {"st-mary-s": NAMES[0], "klinik-nord": NAMES[1], "hôpital-est": NAMES[2]}
    assert {share.name for share in found.shares} == set(whose)
    for share in found.shares:
        both = [*share.rows, *share.held_out]
        assert {held[row] for row in both} == {whose[share.name]}
        assert len(both) == held.count(whose[share.name])
        assert len(share.held_out) == pytest.approx(0.15 * len(both), abs=3)
    assert sorted(row for _, rows in found.test for row in rows) == sorted(r for s in found.shares for r in s.held_out)


def test_records_without_organization_are_not_assigned(toy_plan: NewPlan, tmp_path: Path) -> None:
    rows = [(f"{text} {i}", label, "" if i < 3 else hospital(i)) for i, (text, label) in enumerate(sentences(60))]
    plan = toy_plan(data={"source": str(write(tmp_path / "all.csv", rows))}, simulation=COLUMN)
    with fails_with("data.missing_organization", "3"):
        prepare(plan, "cpu")


def test_a_text_that_is_kept_once_is_with_the_first(toy_plan: NewPlan, tmp_path: Path) -> None:
    rows = [(f"{text} {i}", label, "a" if i < 40 else "b") for i, (text, label) in enumerate(sentences(80))]
    rows += [(*rows[i][:2], "b") for i in range(10)]
    data = {"source": str(write(tmp_path / "all.csv", rows)), "deduplicate": True}
    found = prepare(toy_plan(data=data, simulation=COLUMN), "cpu")
    assert {share.name: len(share.rows) + len(share.held_out) for share in found.shares} == {"a": 40, "b": 40}


@pytest.mark.parametrize(("scheme", "least"), [("column:ward", 5), ("column:hospital", 100)])
def test_what_cannot_be_partitioned_is_refused(toy_plan: NewPlan, file: Path, scheme: str, least: int) -> None:
    with pytest.raises(DataError):
        prepare(toy_plan(data={"source": str(file)}, simulation={"partition": scheme, "min_examples": least}), "cpu")


def test_one_organization_is_no_federation(toy_plan: NewPlan, tmp_path: Path) -> None:
    rows = [(f"{text} {i}", label, "a") for i, (text, label) in enumerate(sentences(60))]
    with fails_with("data.one_organization"):
        prepare(toy_plan(data={"source": str(write(tmp_path / "all.csv", rows))}, simulation=COLUMN), "cpu")


def test_files_and_a_column_are_two_answers_to_one_question(toy_plan: NewPlan, tmp_path: Path) -> None:
    (tmp_path / "orgs").mkdir()
    for name in ("a", "b"):
        write_csv(tmp_path / "orgs" / f"{name}.csv", sentences(60))
    with fails_with("plan.partition"):
        prepare(toy_plan(data={"source": str(tmp_path / "orgs")}, simulation=COLUMN), "cpu")
