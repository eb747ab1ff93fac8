"""Attack: the same text again, with a full stop, a zero-width space, another case.

Each of them was a new record with a fresh budget of 8: a person whose text was exported twice spent 16. Records are recognized by
what a reader sees of them, and counted in one collection only.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset, DatasetManifest, FileSlice
from cotune.plan.load import parse_plan
from cotune.privacy.accounting.composition import Steps

PLAN = parse_plan(
    {
        "labels": ("a", "b"),
        "rounds": 2,
        "model": {"base": "any"},
        "data": {"source": "records.csv"},
        "privacy": {"epsilon": 3.0},
    }
)
TEXTS = ["Der Patient hat Diabetes", "ﬁne café, no complaints", "ward (7) is full"]
VARIANTS = {
    "full stop": "{}.",
    "ellipsis": "{}…",
    "quotes": "«{}»",
    "zero-width space": "{}\u200b",
    "byte order mark": "\ufeff{}",
    "right-to-left mark": "{}\u200f",
    "control character": "\x07{}",
    "variation selector": "{}\ufe0f",
    "spaces": "  {}\u00a0",
}


def counted(folder: Path, texts: list[str], collection: str) -> Dataset:
    """What counts at the site in the folder, whose file of records now holds these texts."""
    folder.mkdir(exist_ok=True)
    source = folder / f"{collection}.csv"
    quoted = "".join('"{}",{}\n'.format(text.replace('"', '""'), "ab"[i % 2]) for i, text in enumerate(texts))
    source.write_text("text,label\n" + quoted, encoding="utf-8")
    described = DatasetManifest(data=DataConfig(source=str(source)), portions=(FileSlice(path=None),), collection=collection)
    (folder / "data.json").write_text(described.model_dump_json())
    (folder / "site.json").write_text(SiteFile(organization="clinic", device="cpu").model_dump_json())
    return Site(folder).counted_dataset(PLAN)


def charge(folder: Path, held: Dataset) -> None:
    ledger = Site(folder).ledger()
    data = ledger.register_data_set(held.get_unit_identities())
    ledger.reserve("a", 1, Steps(0.7, 1.0, 1), data=data, collection=held.collection)


def assert_known_again(folder: Path, changed: list[str]) -> None:
    """In another collection, with a budget of its own, none of them counts."""
    charge(folder, counted(folder, TEXTS, "first"))
    again = counted(folder, [*changed, "not seen before"], "second")
    assert again.inputs() == ["not seen before"]
    assert again.left_out() == {"in another collection": len(changed)}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_near_duplicate_has_no_budget_of_its_own(tmp_path: Path, variant: str) -> None:
    assert_known_again(tmp_path / "site", [variant.format(text) for text in TEXTS])


def test_neither_has_another_case_or_unicode_form(tmp_path: Path) -> None:
    assert_known_again(tmp_path / "site", [text.upper().replace("É", "E\u0301") for text in TEXTS])


def test_another_text_has(tmp_path: Path) -> None:
    charge(tmp_path / "site", counted(tmp_path / "site", TEXTS, "first"))
    others = ["something else", "and more", "and yet more"]
    assert counted(tmp_path / "site", others, "second").inputs() == others
