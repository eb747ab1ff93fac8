"""Attack: a patient in one collection decides about many in another.

Collections have totals of their own, and who was charged in one is left out of the others. Who that is was told by patients and by their
texts. With "no complaints" as a text of one patient in the first collection, all patients of the second who had such a text were left
out: 1 counted instead of 41, so that one patient more or less moved a step there by 40 clip norms, and was charged for none. Under the
same unit a person is now known by the unit alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset, DatasetManifest, FileSlice
from cotune.errors import PrivacyError
from cotune.plan.load import parse_plan
from cotune.privacy.accounting.composition import Steps

PLAN = parse_plan(
    {
        "labels": ("a", "b"),
        "rounds": 2,
        "model": {"base": "any"},
        "data": {"source": "records.csv"},
        "privacy": {"epsilon": 3.0, "unit": "pid", "max_records": 3},
    }
)
COMMON = "no complaints"
Row = tuple[str, str]  # text, patient
FIRST = [(f"text {i}", f"p{i}") for i in range(5)]
SECOND = [(COMMON, f"q{i}") for i in range(40)] + [("else", "q40")]


def counted(folder: Path, rows: list[Row], collection: str) -> Dataset:
    """What counts at the site in the folder, whose records are now these."""
    folder.mkdir(exist_ok=True)
    source = folder / f"{collection}.csv"
    source.write_text("text,label,pid\n" + "".join(f"{text},a,{whose}\n" for text, whose in rows), encoding="utf-8")
    described = DatasetManifest(
        data=DataConfig(source=str(source), unit="pid"), portions=(FileSlice(path=None),), collection=collection
    )
    (folder / "data.json").write_text(described.model_dump_json())
    (folder / "site.json").write_text(SiteFile(organization="clinic", device="cpu").model_dump_json())
    return Site(folder).counted_dataset(PLAN)


def charge(folder: Path, held: Dataset) -> None:
    ledger = Site(folder).ledger()
    data = ledger.register_data_set(held.get_unit_identities(), unit=str(held.unit), also=held.linked_identities())
    ledger.reserve("a", 1, Steps(0.7, 1.0, 1), data=data, collection=held.collection)


def second_after(folder: Path, first: list[Row], second: list[Row]) -> Dataset:
    charge(folder, counted(folder, first, "first"))
    return counted(folder, second, "second")


def test_a_patient_decides_about_no_other(tmp_path: Path) -> None:
    without = second_after(tmp_path / "without", FIRST, SECOND)
    with_one = second_after(tmp_path / "with", [*FIRST, (COMMON, "victim")], SECOND)
    assert with_one.get_unit_identities() == without.get_unit_identities()
    assert with_one.inputs() == without.inputs()
    assert len(with_one.units) == 41


def test_such_patients_can_be_charged(tmp_path: Path) -> None:
    """Whether a charge is refused must not tell of the text either."""
    charge(tmp_path / "site", second_after(tmp_path / "site", [*FIRST, (COMMON, "victim")], SECOND))
    assert {c.collection for c in Site(tmp_path / "site").ledger().charges()} == {"first", "second"}


def test_a_patient_still_counts_in_one_collection(tmp_path: Path) -> None:
    held = second_after(tmp_path / "site", FIRST, [("a new text", "P3."), *SECOND])
    assert held.left_out() == {"in another collection": 1}
    assert "a new text" not in held.inputs()
    ledger = Site(tmp_path / "site").ledger()
    twice = ledger.register_data_set(
        [*held.get_unit_identities(), *counted(tmp_path / "site", FIRST, "first").get_unit_identities()], unit="pid"
    )
    with pytest.raises(PrivacyError):
        ledger.reserve("b", 1, Steps(0.7, 1.0, 1), data=twice, collection="second")
