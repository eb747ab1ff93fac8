"""An exported ledger, recomputed: the true one holds, and every single lie in it shows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.client.ledger_report import export_ledger
from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.ledger.charges import Limit
from cotune.privacy.ledger.verification import verify_export
from cotune.privacy.policy import BudgetRules, Policy, dump_policy
from cotune.storage.append_only_log import START_HASH
from cotune.storage.log_entries import entry_hash
from tests.support.failures import fails_with

DELTA = 1e-5


@pytest.fixture
def exported(tmp_path: Path) -> dict[str, Any]:
    """Two data sets in a collection, the second grown from the first and charged by a second run; one in another, interrupted."""
    (tmp_path / "site.json").write_text(SiteFile(organization="clinic").model_dump_json())
    (tmp_path / "policy.toml").write_text(dump_policy(Policy(budget=BudgetRules(epsilon_total=8.0))))
    site = Site(tmp_path)
    ledger = site.ledger()
    total = Limit("budget.epsilon_total", 8.0, DELTA)

    def reserve(plan: str, round: int, steps: Steps, data: str, collection: str = "wards") -> int:
        limits = [total, Limit("budget.epsilon_per_run", 3.0, DELTA, plan * 64)]
        return ledger.reserve(plan * 64, round, steps, data=data, collection=collection, plan="tweets", limits=limits)

    small = ledger.register_data_set([i.to_bytes(16, "big") for i in range(100)])
    for round in (1, 2):
        ledger.settle(reserve("a", round, Steps(1.1, 0.02, 20), small), 20)
    grown = ledger.register_data_set([i.to_bytes(16, "big") for i in range(150)])
    ledger.settle(reserve("b", 1, Steps(1.5, 0.02, 20), grown), 18)
    images = ledger.register_data_set([i.to_bytes(16, "big") for i in range(500, 600)])
    ledger.settle(reserve("c", 1, Steps(20.0, 1.0, 1, "geometric"), images, "images"), 1)
    reserve("c", 1, Steps(2.0, 1.0, 1), images, "images")
    found: dict[str, Any] = json.loads(json.dumps(export_ledger(site)))
    return found


def test_a_true_export_holds(exported: dict[str, Any]) -> None:
    found = verify_export(exported)
    assert (found["valid"], found["problems"]) == (True, [])
    assert (found["head"], found["entries"]) == (exported["head"], len(exported["entries"]))
    assert [table["composition"].split(",")[0] for table in found["collections"]] == ["renyi filter", "pld"]
    for table, stated in zip(found["collections"], exported["collections"], strict=True):
        assert table["epsilon"] == table["epsilon_stated"] == stated["epsilon"]
        for run in table["runs"]:
            assert run["epsilon_at_least"] <= run["epsilon"] <= run["epsilon_renyi"]


def lie(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(exported: dict[str, Any]) -> None:
        *folders, last = path
        place: Any = exported
        for key in folders:
            place = place[key]
        place[last] = value

    return change


def forget(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(exported: dict[str, Any]) -> None:
        *folders, last = path
        place: Any = exported
        for key in folders:
            place = place[key]
        del place[last]

    return change


@pytest.mark.parametrize(
    "told",
    [
        lie("head", value="0" * 64),
        lie("entries", 2, "body", "noise_multiplier", value=9.0),
        lie("entries", 2, "at", value="2020-01-01"),
        forget("entries", 3),
        forget("entries", -1),
        forget("collections", 1),
        forget("collections", 0, "data_sets", 1),
        lie("collections", 0, "collection", value="images"),
        lie("collections", 0, "epsilon", value=0.5),
        lie("collections", 0, "epsilon_at_small_delta", value=0.5),
        lie("collections", 0, "true_positive_rate", value=0.05),
        lie("collections", 0, "runs", 0, "gaussian_mu", value=0.1),
        lie("collections", 0, "epsilon_left", value=7.5),
        lie("collections", 0, "delta", value=1e-3),
        lie("collections", 0, "composition", value="pld"),
        lie("collections", 0, "data_sets", 0, "records", value=10**6),
        lie("collections", 0, "data_sets", 0, "shares_records_with", value={}),
        lie("collections", 0, "epsilon_total", value=1.0),
        lie("collections", 0, "events", 0, "noise_multiplier", value=9.0),
        forget("collections", 0, "events", 0),
        lie("collections", 0, "runs", 0, "epsilon", value=0.1),
        forget("collections", 0, "runs", 0),
    ],
)
def test_every_lie_shows(exported: dict[str, Any], told: Callable[[dict[str, Any]], None]) -> None:
    changed = copy.deepcopy(exported)
    told(changed)
    found = verify_export(changed)
    assert not found["valid"]
    assert found["problems"]


def rechained(exported: dict[str, Any]) -> dict[str, Any]:
    """With hashes that follow from the entries, as anyone who holds the ledger can make them."""
    previous = START_HASH
    for number, entry in enumerate(exported["entries"], start=1):
        body = json.dumps(entry["body"], sort_keys=True, separators=(",", ":"))
        entry["id"] = number
        entry["hash"] = entry_hash(previous, number, entry["at"], entry["kind"], body)
        previous = entry["hash"]
    exported["head"] = previous
    return exported


@pytest.mark.parametrize("steps", [0, -5, 21])
@pytest.mark.parametrize("again", [True, False])
def test_a_charge_that_is_lowered_by_what_no_ledger_enters_shows(exported: dict[str, Any], steps: int, again: bool) -> None:
    """The last of several settlements counted, also one below nothing: ε 0.76 became 0.34, and the export was called valid."""
    reserved = next(e["id"] for e in exported["entries"] if e["kind"] == "reserve" and e["body"]["count"] == 20)
    if again:
        exported["entries"].append(
            {**exported["entries"][-1], "kind": "settle", "body": {"charge": reserved, "steps": steps, "seconds": 0.0}}
        )
    else:
        settled = next(e for e in exported["entries"] if e["kind"] == "settle" and e["body"]["charge"] == reserved)
        settled["body"]["steps"] = steps if steps else 10**6
    found = verify_export(rechained(exported))
    assert not found["valid"]
    assert any("lowers charge" in problem for problem in found["problems"])


@pytest.mark.parametrize("change", [{"mechanism": "Geometric"}, {"noise_multiplier": 0.0}, {"sample_rate": 1.5}])
def test_a_charge_that_no_mechanism_can_be_shows(exported: dict[str, Any], change: dict[str, Any]) -> None:
    next(e for e in exported["entries"] if e["body"].get("mechanism") == "geometric")["body"].update(change)
    found = verify_export(rechained(exported))
    assert not found["valid"]
    assert found["collections"] == []


@pytest.mark.parametrize(
    "content", [{}, {"entries": 3}, {"entries": [], "head": None, "collections": [{}]}, {"entries": [{"id": 1}]}]
)
def test_what_is_no_export_is_one_sentence(content: dict[str, Any]) -> None:
    with fails_with("data.not_a_ledger"):
        verify_export(content)
