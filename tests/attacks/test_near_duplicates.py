"""Attack: the same text again, with a full stop, a zero-width space, another case.

Each of them was a new record with a fresh budget of 8: a person whose text was exported twice spent 16. Records are recognized by
what a reader sees of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.client.account import Account
from cotune.client.site import Site, SiteFile
from cotune.models.errors import Declined
from cotune.models.holdings import write_holdings
from cotune.models.records import DataConfig
from cotune.plan.load import parse_plan
from cotune.privacy.accounting import Steps
from cotune.privacy.ledger import Limit
from cotune.privacy.policy import Policy, dump_policy

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


def account(folder: Path, texts: list[str], seed: int = 1) -> Account:
    """At the site in the folder, whose file of records now holds these texts."""
    folder.mkdir(exist_ok=True)
    source = folder / f"records-{seed}.csv"
    quoted = "".join('"{}",{}\n'.format(text.replace('"', '""'), "ab"[i % 2]) for i, text in enumerate(texts))
    source.write_text("text,label\n" + quoted, encoding="utf-8")
    write_holdings(folder / "data.json", DataConfig(source=str(source)), [(None, list(range(len(texts))))])
    (folder / "site.json").write_text(SiteFile(organisation="clinic", device="cpu").model_dump_json())
    (folder / "policy.toml").write_text(dump_policy(Policy.permissive()))
    plan = parse_plan(
        {"labels": ("a", "b"), "rounds": 2, "model": {"base": "any"}, "data": {"source": str(source)}, "seed": seed}
    )
    site = Site(folder)
    return Account(plan, site.policy(), site, site.holdings(plan.labels))


def assert_known_again(folder: Path, changed: list[str]) -> None:
    first = account(folder, TEXTS)
    steps = Steps(0.7, 1.0, 1)
    limit = Limit("budget.epsilon_total", 8.0, 1e-5)
    first.ledger.reserve("a", 1, steps, data=first.data, limits=[limit])
    again = account(folder, changed, seed=2)
    assert again.ledger.spent(data=again.data) == [steps]
    with pytest.raises(Declined):
        again.ledger.reserve("b", 1, steps, data=again.data, limits=[limit])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_near_duplicate_has_no_budget_of_its_own(tmp_path: Path, variant: str) -> None:
    assert_known_again(tmp_path / "site", [variant.format(text) for text in TEXTS])


def test_neither_has_another_case_or_unicode_form(tmp_path: Path) -> None:
    assert_known_again(tmp_path / "site", [text.upper().replace("É", "E\u0301") for text in TEXTS])


def test_another_text_has(tmp_path: Path) -> None:
    first = account(tmp_path / "site", TEXTS)
    first.ledger.reserve("a", 1, Steps(1.0, 1.0, 1), data=first.data)
    other = account(tmp_path / "site", ["something else", "and more", "and yet more"], seed=2)
    assert other.ledger.spent(data=other.data) == []
