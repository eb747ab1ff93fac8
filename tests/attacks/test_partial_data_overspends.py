"""Attack: train on a part of the data, where δ is larger, until the part's own limit is reached.

Limits were checked for the data set that was charged, at its own δ. 10,000 records were promised ε = 8 at δ = 1/10,000^1.1; a plan
for 500 of them was measured at δ = 1/500^1.1, and the records had spent 10.32 of 8 by the promise that was made to them first. Now a
limit holds for every data set that shares a record with the one that is charged, at the smallest δ that any of them was promised.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.data.config import DataConfig
from cotune.data.dataset import write_manifest
from cotune.errors import PolicyError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import compute_delta
from cotune.privacy.ledger.charges import Limit
from cotune.privacy.ledger.ledger import Ledger
from cotune.privacy.policy import Policy, dump_policy
from tests.support.failures import fails_with
from tests.support.oracle_epsilon import oracle_epsilon

LIMIT = 8.0
WHOLE = 10_000
PART = 500
RULE = "budget.epsilon_total"
ROUND = Steps(1.0, 0.1, 10)


def records(numbers: range) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def exhaust(ledger: Ledger, plan_id: str, data: str, limit: Limit, collection: str = "") -> int:
    """Charges round after round until the ledger refuses; returns how many were charged."""
    for number in range(1, 100):
        try:
            ledger.reserve(plan_id, number, ROUND, data=data, collection=collection, limits=[limit])
        except PolicyError:
            return number - 1
    raise AssertionError("nothing stopped the run")


@pytest.mark.parametrize("plans", [("a",), ("a", "b")])
def test_a_part_of_the_data_does_not_get_a_larger_budget(tmp_path: Path, plans: tuple[str, ...]) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    whole = ledger.register_data_set(records(range(WHOLE)))
    part = ledger.register_data_set(records(range(PART)))
    promised, own = (Limit(RULE, LIMIT, compute_delta("1/n^1.1", n)) for n in (WHOLE, PART))
    ledger.reserve(plans[0], 1, ROUND, data=whole, limits=[promised])
    assert exhaust(ledger, plans[-1], part, own) > 1
    assert oracle_epsilon(ledger.spent(), own.delta, 1e-3) < LIMIT
    assert oracle_epsilon(ledger.spent(), promised.delta, 1e-3) <= LIMIT  # was 10.32


def test_what_is_left_of_the_whole_holds_for_every_part(tmp_path: Path) -> None:
    """A part is exhausted first, then the whole is asked: the part's records are in it."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    part = ledger.register_data_set(records(range(PART)))
    whole = ledger.register_data_set(records(range(WHOLE)))
    other = ledger.register_data_set(records(range(WHOLE, WHOLE + PART)))
    limit = Limit(RULE, LIMIT, compute_delta("1/n^1.1", WHOLE))
    exhaust(ledger, "a", part, limit, "wards")
    assert exhaust(ledger, "a", whole, limit, "wards") == 0
    assert exhaust(ledger, "a", whole, limit) == 0
    assert exhaust(ledger, "a", other, limit, "images") > 0  # records that were in neither, and are said to be others


def test_a_part_at_a_real_site_is_declined(tmp_path: Path) -> None:
    """The same through an account: the plan that fits the part alone is refused before anything is charged."""
    source = tmp_path / "records.csv"
    source.write_text("text,label\n" + "".join(f"report {i},{'ab'[i % 2]}\n" for i in range(400)), encoding="utf-8")

    def account(rows: range, seed: int) -> Account:
        folder = tmp_path / "site"
        write_manifest(folder / "data.json", DataConfig(source=str(source)), [(None, list(rows))])
        (folder / "site.json").write_text(SiteFile(organization="clinic", device="cpu").model_dump_json())
        allowed = Policy.permissive()
        rules = {**dict(allowed.budget), "epsilon_total": 3.0}
        (folder / "policy.toml").write_text(dump_policy(allowed.model_copy(update={"budget": type(allowed.budget)(**rules)})))
        site = Site(folder)
        plan = make_plan(source, seed)
        return Account(plan, site.policy(), site, site.dataset(plan.labels))

    first = account(range(400), 1)
    first.reserve(1, Steps(first.plan_noise(1), 0.2, 8))
    spent = first.ledger.spent()
    second = account(range(40), 2)
    with fails_with(f"policy.{RULE}"):
        second.plan_noise(1)
    with fails_with(f"policy.{RULE}"):
        second.reserve(1, spent[0])
    assert first.ledger.spent() == spent


def make_plan(source: Path, seed: int) -> Plan:
    return parse_plan(
        {
            "seed": seed,
            "labels": ("a", "b"),
            "rounds": 2,
            "model": {"base": "any"},
            "data": {"source": str(source)},
            "local": {"batch_size": 0.2, "steps": 4},
            "privacy": {"epsilon": 2.0},
        }
    )
