"""What a ledger knows of its log, beside what is computed from the whole log."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.privacy.accounting.composition import Steps, add_counts
from cotune.privacy.accounting.filters import epsilon_over_runs
from cotune.privacy.ledger.charges import (
    build_histories,
    find_charged_elsewhere,
    list_charges,
    list_counted_charges,
    list_data_sets,
)
from cotune.privacy.ledger.ledger import Ledger
from cotune.privacy.ledger.totals import Totals
from cotune.storage.log_entries import Entry

COLLECTIONS = ("", "wards", "images")
RULE = "budget.epsilon_total"
steps = st.builds(Steps, st.sampled_from([0.9, 1.3, 7.0]), st.sampled_from([0.1, 1.0]), st.integers(0, 9))
numbers = st.builds(Steps, st.sampled_from([3.0, 20.0]), st.just(1.0), st.just(1), st.just("geometric"))
limit = st.builds(lambda d: {"rule": RULE, "epsilon": 8.0, "delta": d, "plan_id": None}, st.sampled_from([1e-4, 1e-6]))


@st.composite
def logs(draw: st.DrawFn) -> list[Entry]:
    """Charges of three runs in three collections on data sets that appear on the way; some are settled, some twice."""
    entries: list[Entry] = []

    def append(kind: str, body: dict[str, Any]) -> None:
        entries.append(Entry(len(entries) + 1, "now", kind, body, ""))

    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["data", "reserve", "reserve", "settle", "unprotected"]))
        where = draw(st.sampled_from(COLLECTIONS))
        known = [e.body["fingerprint"] for e in entries if e.kind == "data"]
        open_charges = [e for e in entries if e.kind == "reserve"]
        if kind == "data":
            shares = {known[0]: 1} if known else {}
            append("data", {"fingerprint": f"data-{len(entries)}", "records": 3, "shares": shares})
        elif kind == "reserve":
            charged = asdict(draw(st.one_of(steps, numbers)))
            body = {"plan_id": draw(st.sampled_from("abc")), "plan": "", "round": 1, "purpose": "training", **charged}
            data = draw(st.sampled_from([*known, ""]))
            append("reserve", {**body, "data": data, "collection": where, "limits": draw(st.lists(limit, max_size=1))})
        elif kind == "settle" and open_charges:
            charge = draw(st.sampled_from(open_charges))
            ran = draw(st.integers(0, charge.body["count"]))
            append("settle", {"charge": charge.id, "steps": ran, "seconds": 0.5})
        elif kind == "unprotected":
            append("unprotected", {"plan_id": "a", "plan": "", "round": 1, "what": "training", "data": "", "collection": where})
    return entries


@settings(max_examples=150, deadline=None)
@given(logs())
def test_totals_are_those_of_the_whole_log(entries: list[Entry]) -> None:
    totals = Totals()
    for entry in entries:
        totals.add(entry)
    assert totals.data_sets == list_data_sets(entries)
    for collection in COLLECTIONS:
        assert totals.find_charged_elsewhere(collection) == find_charged_elsewhere(entries, collection)
        for plan_id in (None, "a", "b", "d"):
            counted = list_counted_charges(entries, collection or None)
            spent = [c.steps for c in counted if plan_id in (None, c.plan_id)]
            assert totals.spent(plan_id, collection, float("inf")) == spent
        expected = build_histories(entries, collection, RULE)
        found = totals.histories(collection, RULE)
        assert [(h.collection, list(h.runs), h.delta) for h in found] == [(h.collection, list(h.runs), h.delta) for h in expected]
        for kept, whole in zip(found, expected, strict=True):
            for plan_id, charged in whole.runs.items():
                assert set(kept.runs[plan_id]) == set(add_counts(charged))
            more = (Steps(1.3, 0.1, 2),)
            assert kept.compute_epsilon(8.0, 1e-5) == epsilon_over_runs(whole.runs, 8.0, 1e-5)
            grown = {**whole.runs, "d": more}
            assert kept.compute_epsilon(8.0, 1e-5, "d", more) == epsilon_over_runs(grown, 8.0, 1e-5)
            assert whole.compute_epsilon(8.0, 1e-5, "d", more) == epsilon_over_runs(grown, 8.0, 1e-5)


@settings(max_examples=100, deadline=None)
@given(logs())
def test_open_charges_are_those_without_a_settlement(entries: list[Entry]) -> None:
    totals = Totals()
    for entry in entries:
        totals.add(entry)
    for charge in list_charges(entries):
        assert totals.open_steps(charge.id) == (charge.steps if charge.state == "reserved" else None)


def test_a_ledger_that_is_opened_again_knows_the_same(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    data = ledger.register_data_set([b"a" * 16, b"b" * 16])
    for round in (1, 2, 3):
        charge = ledger.reserve("plan", round, Steps(1.0, 0.1, 4), data=data)
        if round < 3:
            ledger.settle(charge, 4, 1.5)
            ledger.record_answer("plan", round, data=data)
    again = Ledger(ledger.path)
    for each in (ledger, again):
        assert [c.state for c in each.charges()] == ["settled", "settled", "reserved"]
        assert (each.seconds("plan"), each.rounds("plan"), each.last_answered_round("plan")) == (3.0, [1, 2, 3], 2)
    assert ledger.histories() == again.histories()
    assert ledger.spent() == again.spent() == [c.steps for c in ledger.charges()]
