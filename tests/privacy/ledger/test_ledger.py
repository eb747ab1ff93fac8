from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.errors import PolicyError, PrivacyError
from cotune.privacy.accounting import filters
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.filters import epsilon_over_runs
from cotune.privacy.ledger.charges import Limit
from cotune.privacy.ledger.ledger import Ledger
from cotune.storage.log_entries import entry_hash
from tests.support.failures import fails_with
from tests.support.fork_server import preloaded
from tests.support.ledger_processes import reserve_and_settle, reserve_and_wait, reserve_to_the_limit
from tests.support.processes import forked

__all__ = ["forked"]  # fixtures

ROUND = Steps(1.0, 0.05, 20)
Forked = Callable[..., BaseProcess]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "site" / "ledger.sqlite")


def together(forked: Forked, ledger: Ledger, function: Callable[..., None], *arguments: object) -> None:
    """Two processes, of the plans "a" and "b", do something with a ledger at the same time."""
    start = preloaded().Barrier(2)
    processes = [forked(function, ledger.path, start, plan, *arguments) for plan in ("a", "b")]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_new_ledger_is_empty(ledger: Ledger) -> None:
    assert ledger.spent() == []
    assert ledger.rounds("plan") == []


def test_a_reservation_counts_at_once_and_settles_to_what_ran(ledger: Ledger) -> None:
    charge = ledger.reserve("plan", 1, ROUND)
    assert Ledger(ledger.path).spent() == [ROUND]
    ledger.settle(charge, 12)
    assert Ledger(ledger.path).spent() == [Steps(1.0, 0.05, 12)]


def test_charges_of_all_plans_add_up(ledger: Ledger) -> None:
    for number, (plan, steps) in enumerate([("a", ROUND), ("b", Steps(2.0, 1.0, 3)), ("a", ROUND)], start=1):
        ledger.settle(ledger.reserve(plan, number, steps), steps.count)
    assert ledger.spent() == [ROUND, Steps(2.0, 1.0, 3), ROUND]
    assert ledger.spent("a") == [ROUND, ROUND]
    assert ledger.rounds("a") == [1, 3]
    assert epsilon(ledger.spent("a"), 1e-5) == epsilon([Steps(1.0, 0.05, 40)], 1e-5)


def test_values_come_back_exactly(ledger: Ledger) -> None:
    steps = Steps(0.1 + 0.2, 1 / 3, 7)
    ledger.reserve("plan", 1, steps)
    assert ledger.spent() == [steps]


@pytest.mark.parametrize("steps_run", [21, -1])
def test_a_settlement_outside_the_reservation_is_refused(ledger: Ledger, steps_run: int) -> None:
    charge = ledger.reserve("plan", 1, ROUND)
    with fails_with("privacy.charge_not_open", str(charge), str(steps_run)):
        ledger.settle(charge, steps_run)
    assert ledger.spent() == [ROUND]
    ledger.settle(charge, 20)  # the reservation is still open


def test_a_charge_is_settled_once(ledger: Ledger) -> None:
    charge = ledger.reserve("plan", 1, ROUND)
    ledger.settle(charge, 20)
    with fails_with("privacy.charge_not_open"):
        ledger.settle(charge, 0)
    with fails_with("privacy.charge_not_open"):
        ledger.settle(charge + 1, 0)
    assert ledger.spent() == [ROUND]


@pytest.mark.parametrize("steps", [Steps(0.0, 0.1, 5), Steps(1.0, 0.0, 5), Steps(1.0, 1.5, 5), Steps(1.0, 0.1, -5)])
def test_impossible_charges_are_refused(ledger: Ledger, steps: Steps) -> None:
    with pytest.raises((PrivacyError, sqlite3.IntegrityError)):
        ledger.reserve("plan", 1, steps)
    assert ledger.spent() == []


def assert_one_sentence(error: PrivacyError) -> None:
    assert "privacy ledger" in str(error)
    assert "expected" in str(error)
    assert "\n" not in str(error)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"these are no charges" * 100)
    with pytest.raises(PrivacyError) as raised:
        Ledger(path)
    assert_one_sentence(raised.value)
    assert path.read_bytes() == b"these are no charges" * 100  # left for anyone who repairs it


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError) as raised:
        Ledger(tmp_path)
    assert_one_sentence(raised.value)


def test_a_truncated_ledger_is_refused(ledger: Ledger) -> None:
    for number in range(100):
        ledger.reserve("plan" * 50, number, ROUND)
    ledger.close()  # all that was written is in the file, and no lock is waited for
    content = ledger.path.read_bytes()
    assert len(content) > 8 * 4096
    ledger.path.write_bytes(content[: len(content) // 2 // 4096 * 4096])
    with pytest.raises(PrivacyError) as raised:
        Ledger(ledger.path).spent()
    assert_one_sentence(raised.value)


def test_a_ledger_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE charges (amount REAL)")
    with pytest.raises(PrivacyError) as raised:
        Ledger(path).reserve("plan", 1, ROUND)
    assert_one_sentence(raised.value)


@pytest.mark.crash
def test_a_killed_process_leaves_its_reservation(ledger: Ledger, forked: Forked) -> None:
    ledger.settle(ledger.reserve("plan", 1, ROUND), 20)
    told, tells = preloaded().Pipe(duplex=False)
    process = forked(reserve_and_wait, ledger.path, tells, ROUND)
    charge = told.recv()
    process.kill()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert Ledger(ledger.path).spent() == [ROUND, ROUND]
    assert Ledger(ledger.path).rounds("plan") == [1, 2]
    Ledger(ledger.path).settle(charge, 20)  # the file is not locked by the dead


def test_processes_that_reserve_together_lose_nothing(ledger: Ledger, forked: Forked) -> None:
    settled = [9, 5] * 20
    together(forked, ledger, reserve_and_settle, Steps(1.0, 0.1, 9), settled)
    for name in ("a", "b"):
        assert ledger.spent(name) == [Steps(1.0, 0.1, 9), Steps(1.0, 0.1, 5)] * 20
        assert ledger.rounds(name) == list(range(40))
    assert len(ledger.spent()) == 80


# --- data sets


def records(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def test_a_data_set_is_its_records_in_any_order(ledger: Ledger) -> None:
    first = ledger.register_data_set(records(1, 2, 3))
    assert ledger.register_data_set(records(3, 1, 2)) == first
    assert [(d.records, d.shares) for d in ledger.data_sets()] == [(3, {})]
    assert ledger.register_data_set(records(1, 2, 3, 3)) != first  # a record that is there twice is two records


def test_a_data_set_is_never_taken_for_the_one_before(ledger: Ledger) -> None:
    """Also where it has as many records, or the same ones in another role."""
    sets = [
        (records(1, 2), ()),
        (records(1, 3), ()),
        (records(1, 2), records(3)),
        (records(1), records(2, 3)),
        (records(1, 2), ()),
    ]
    names = [ledger.register_data_set(units, also=also) for units, also in sets]
    assert names == [Ledger(ledger.path).register_data_set(units, also=also) for units, also in sets]
    assert names[0] == names[4]
    assert len(set(names)) == 3  # the third and the fourth are the same records'


def test_links_are_kept_for_the_owner_and_decide_nothing(ledger: Ledger) -> None:
    small = ledger.register_data_set(records(1, 2, 3))
    other = ledger.register_data_set(records(7, 8))
    ledger.reserve("a", 1, ROUND, data=small)
    ledger.reserve("b", 1, Steps(2.0, 0.5, 3), data=other)
    grown = ledger.register_data_set(records(1, 2, 3, 4, 5))
    ledger.reserve("c", 1, Steps(3.0, 0.5, 1), data=grown)
    assert [d.shares for d in ledger.data_sets()] == [{grown: 3}, {}, {small: 3}]
    [history] = ledger.histories()
    assert list(history.runs) == ["a", "b", "c"]  # whichever data they were charged on
    assert ledger.spent("b") == [Steps(2.0, 0.5, 3)]


# --- collections


def test_a_collection_counts_its_own_charges_and_those_of_none(ledger: Ledger) -> None:
    everywhere = Steps(1.0, 0.1, 1)
    wards = Steps(1.0, 0.1, 2)
    images = Steps(1.0, 0.1, 3)
    ledger.reserve("a", 1, everywhere)
    ledger.reserve("a", 2, wards, data=ledger.register_data_set(records(1)), collection="wards")
    ledger.reserve("b", 1, images, data=ledger.register_data_set(records(2)), collection="images")
    assert ledger.spent(collection="wards") == [everywhere, wards]
    assert ledger.spent(collection="images") == [everywhere, images]
    assert ledger.spent(collection="new") == [everywhere]
    assert ledger.spent() == ledger.spent(collection="") == [everywhere, wards, images]
    assert [(h.collection, list(h.runs)) for h in ledger.histories("wards")] == [("wards", ["a"])]
    assert [(h.collection, list(h.runs)) for h in ledger.histories("")] == [("wards", ["a"]), ("images", ["a", "b"])]


def test_a_charge_in_no_collection_is_held_against_every_one(ledger: Ledger) -> None:
    limit = Limit("budget.epsilon_total", epsilon([ROUND, ROUND], 5e-6) + 1e-9, 1e-5)
    for number in (1, 2):
        ledger.reserve("plan", number, ROUND, data=ledger.register_data_set(records(1)), collection="wards", limits=[limit])
    with fails_with("policy.budget.epsilon_total", "wards"):
        ledger.reserve("plan", 3, ROUND, data=ledger.register_data_set(records(7)), limits=[limit])
    ledger.reserve("plan", 3, ROUND, data=ledger.register_data_set(records(7)), collection="images", limits=[limit])


def test_charge_in_another_collection_is_named_and_refused(ledger: Ledger) -> None:
    zeros = bytes(16)  # a trailing zero byte is a byte
    held = [*records(1, 2), zeros]
    wards = ledger.register_data_set(held)
    assert ledger.find_charged_elsewhere(held, "images") == set()  # known, and not charged
    ledger.reserve("plan", 1, ROUND, data=wards, collection="wards")
    assert ledger.find_charged_elsewhere([*records(2, 3), zeros], "images") == {*records(2), zeros}
    assert (
        ledger.find_charged_elsewhere(records(2, 3), "wards")
        == ledger.find_charged_elsewhere(records(2, 3), "")
        == ledger.find_charged_elsewhere([], "images")
        == set()
    )
    both = ledger.register_data_set(records(2, 3))
    with fails_with("privacy.mixed_collections"):
        ledger.reserve("plan", 2, ROUND, data=both, collection="images")
    assert ledger.spent() == [ROUND]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets=st.lists(st.tuples(st.sets(st.integers(0, 8), max_size=5), st.sampled_from(["", "a", "b"])), min_size=1, max_size=6))
def test_no_record_is_charged_too_little(tmp_path_factory: pytest.TempPathFactory, sets: list[tuple[set[int], str]]) -> None:
    """What counts for a collection is at least what was charged to any one of its records, as far as it was not left out."""
    # type: ignore[var-annotated]
    ledger = Ledger(tmp_path_factory.mktemp("site") / "ledger.sqlite")
    charged = {}
    for number, (members, collection) in enumerate(sets, start=1):
        held = sorted(set(records(*members)) - ledger.find_charged_elsewhere(records(*members), collection))
        ledger.reserve("plan", number, Steps(number, 0.1, 1), data=ledger.register_data_set(held), collection=collection)
        for record in held:
            charged.setdefault(record, []).append((number, collection))
    counted = {h.collection: {s.noise_multiplier for s in h.runs["plan"]} for h in ledger.histories("")}
    for charges in charged.values():
        assert len({collection for _, collection in charges if collection}) <= 1
        assert any({number for number, _ in charges} <= numbers for numbers in counted.values())


# --- limits


def test_a_limit_is_checked_before_anything_is_charged(ledger: Ledger) -> None:
    data = ledger.register_data_set(records(1, 2))
    delta = 1e-5
    limit = Limit("budget.epsilon_total", epsilon([ROUND, ROUND], delta / 2) + 1e-9, delta)
    for number in (1, 2):
        ledger.reserve("plan", number, ROUND, data=data, limits=[limit])
    with fails_with("policy.budget.epsilon_total", "1e-05", "0.00") as declined:
        ledger.reserve("plan", 3, ROUND, data=data, limits=[limit])
    assert declined.value.rule == "budget.epsilon_total"
    assert declined.value.public == "declined: its rule budget.epsilon_total does not allow this plan"
    assert len(ledger.spent()) == 2
    with pytest.raises(PolicyError):
        ledger.reserve("plan", 3, ROUND, data=ledger.register_data_set(records(3)), limits=[limit])  # other data count, too
    ledger.reserve(
        "other", 1, ROUND, data=data, limits=[Limit("run", limit.epsilon, delta, "other")]
    )  # another run has a budget of its own


def test_processes_together_do_not_exceed_a_limit(ledger: Ledger, forked: Forked) -> None:
    together(forked, ledger, reserve_to_the_limit, ROUND, Limit("total", 3.0, 1e-5))
    runs = {name: ledger.spent(name) for name in ("a", "b")}
    reached = [epsilon_over_runs({**runs, name: [*runs[name], *more]}, 3.0, 1e-5) for name in runs for more in ([], [ROUND])]
    assert max(reached[0], reached[2]) <= 3.0 < min(reached[1], reached[3])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sets=st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=4), min_size=2, max_size=6),
    deltas=st.lists(st.sampled_from([1e-3, 1e-5, 1e-7]), min_size=6, max_size=6),
)
def test_no_record_spends_more_than_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sets: list[set[int]], deltas: list[float]
) -> None:
    """Whatever data sets are charged in whatever order, at whatever δ: every record stays within ε at its own smallest δ."""
    # type: ignore[var-annotated]
    ledger = Ledger(tmp_path_factory.mktemp("site") / "ledger.sqlite")
    promised = {}
    spent = {}
    steps = Steps(1.0, 1.0, 1)
    for number, (members, delta) in enumerate(zip(sets, deltas, strict=False), start=1):
        try:
            limit = Limit("budget.epsilon_total", 8.0, delta)
            ledger.reserve("plan", number, steps, data=ledger.register_data_set(records(*members)), limits=[limit])
        except PolicyError:
            continue
        for record in members:
            promised[record] = min(promised.get(record, 1.0), delta)
            spent[record] = [*spent.get(record, []), steps]
    for record, charged in spent.items():
        assert epsilon(charged, promised[record]) <= 8.0


def test_what_was_charged_under_another_unit_is_refused(ledger: Ledger) -> None:
    """Whichever records they are: an exception for data that share none would tell whether they do."""
    texts = ledger.register_data_set(records(1, 2, 3))
    ledger.reserve("a", 1, ROUND, data=texts)
    patients = ledger.register_data_set([b"anna", b"bert"], unit="patient_id", also=records(1, 2, 3))
    assert [d.shares for d in ledger.data_sets()] == [{patients: 3}, {texts: 3}]
    assert [(d.records, d.unit) for d in ledger.data_sets()] == [(3, "record"), (2, "patient_id")]
    other = ledger.register_data_set([b"carl"], unit="patient_id", also=records(4))
    for data in (patients, other):
        with fails_with("privacy.mixed_units", "record"):
            ledger.check_unit(data)
        with fails_with("privacy.mixed_units", "record"):
            ledger.reserve("b", 1, ROUND, data=data)
    ledger.check_unit(texts)


def test_collections_have_one_unit(ledger: Ledger) -> None:
    """A person's texts in the one would decide which records count in the other: more than one unit of it for one here."""
    ledger.reserve("a", 1, ROUND, data=ledger.register_data_set(records(1, 2, 3)), collection="notes")
    patients = ledger.register_data_set([b"carl"], unit="patient_id", also=records(4))
    with fails_with("privacy.mixed_units", "record"):
        ledger.check_unit(patients)
    for collection in ("wards", ""):
        with fails_with("privacy.mixed_units", "record"):
            ledger.reserve("b", 1, ROUND, data=patients, collection=collection)
    assert ledger.spent() == [ROUND]


def test_accountants_that_disagree_charge_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "epsilon", lambda steps, delta: 0.5 * epsilon(steps, delta))
    with fails_with("privacy.accountants_disagree"):
        ledger.reserve("a", 1, ROUND, limits=[Limit("budget.epsilon_per_run", 8.0, 1e-5, "a")])
    assert ledger.spent() == []


# --- the schemas before this one


def test_charge_before_collections_counts_in_all(ledger: Ledger) -> None:
    body = {"plan_id": "old", "plan": "", "round": 1, "data": "", "purpose": "training", **asdict(ROUND)}
    with ledger._chain.transaction() as log:
        log.append("reserve", body)
    ledger.reserve("new", 1, ROUND, collection="wards")
    assert [len(h.runs) for h in ledger.histories("wards")] == [2]
    assert len(ledger.spent(collection="images")) == 1


def test_a_ledger_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "CREATE TABLE charges (id INTEGER PRIMARY KEY, plan_id TEXT NOT NULL, round INTEGER NOT NULL, noise_multiplier REAL,"
            " sample_rate REAL, steps INTEGER, state TEXT, at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)"
        )
        rows = [("p", 1, 1.0, 0.05, 12, "settled"), ("p", 2, 1.0, 0.05, 20, "reserved")]
        db.executemany(
            "INSERT INTO charges (plan_id, round, noise_multiplier, sample_rate, steps, state) VALUES (?, ?, ?, ?, ?, ?)", rows
        )
    ledger = Ledger(path)
    assert ledger.spent() == [Steps(1.0, 0.05, 12), ROUND]
    assert [c.state for c in ledger.charges()] == ["settled", "reserved"]
    assert ledger.spent(collection="wards") == [Steps(1.0, 0.05, 12), ROUND]  # whose records is not known
    assert Ledger(path).rounds("p") == [1, 2]


SECOND = (
    "CREATE TABLE entries (id INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE members (fingerprint TEXT PRIMARY KEY, identities BLOB NOT NULL)",
    "CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END",
    "CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END",
    "CREATE VIEW charges AS SELECT id FROM entries",
    "PRAGMA user_version = 2",
)
UNKEYED = b"0123456789abcdef"


def second_schema(path: Path) -> str:
    """A ledger of the second schema: one data set of one record, two rounds, a value that was told. Returns its head."""
    name = hashlib.sha256(UNKEYED).hexdigest()
    charge = {"plan_id": "p", "plan": "toy", "round": 1, "data": name, "purpose": "training", **asdict(ROUND)}
    bodies: list[tuple[str, dict[str, object]]] = [
        ("data", {"fingerprint": name, "records": 1, "shares": {}}),
        ("reserve", charge),
        ("settle", {"charge": 2, "steps": 12, "seconds": 1.0}),
        ("reserve", {**charge, "round": 2}),
        ("told", {"plan_id": "p", "data": name, "what": "example count", "values": [99.5]}),
    ]
    head = "0" * 64
    with closing(sqlite3.connect(path)) as db, db:
        for statement in SECOND:
            db.execute(statement)
        db.execute("INSERT INTO members VALUES (?, ?)", (name, UNKEYED))
        for id, (kind, body) in enumerate(bodies, start=1):
            text = json.dumps(body, sort_keys=True, separators=(",", ":"))
            head = entry_hash(head, id, "then", kind, text)
            db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (id, "then", kind, text, head))
    path.with_name("ledger.sqlite.head").write_text(json.dumps({"entries": len(bodies), "hash": head}))
    return head


def test_second_schema_ledger_counts_against_every_data_set(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    head = second_schema(path)
    ledger = Ledger(path)
    assert ledger.entries()[0].body == {"schema": 2, "entries": 5, "head": head}
    assert ledger.data_sets() == []
    new = ledger.register_data_set([UNKEYED])  # not known again
    assert new in {d.fingerprint for d in ledger.data_sets()}
    assert Ledger(path).spent(collection="wards") == [Steps(1.0, 0.05, 12), ROUND]
    assert [(c.at, c.plan, c.state) for c in ledger.charges()] == [("then", "toy", "settled"), ("then", "toy", "reserved")]
    assert ledger.get_disclosure("p", "example count") == [99.5]  # not drawn again
    with fails_with("privacy.mixed_units", "record"):  # what it was charged for
        ledger.check_unit(ledger.register_data_set([b"anna"], unit="patient_id"))
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = path.read_bytes()
    assert UNKEYED not in content
    assert hashlib.sha256(UNKEYED).hexdigest().encode() not in content


def test_a_damaged_ledger_of_the_second_schema_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    second_schema(path)
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript("DROP TRIGGER entries_stay; UPDATE entries SET at = 'now' WHERE id = 3")
    with fails_with("privacy.unusable_ledger", "3"):
        Ledger(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM entries").fetchone() == (5,)
        assert db.execute("SELECT identities FROM members").fetchone() == (UNKEYED,)
