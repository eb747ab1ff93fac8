"""A member that attacks, kills again and again, and kills of what has a ledger or no database: the rest of the fault matrix."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cotune.client.audit_log import AuditLog
from cotune.client.ledger_report import summarize_ledger
from cotune.client.site import Site
from cotune.server.runs.exclusions import find_excluded
from tests.support.attackers import Deed, announce_and_stay_away, bomb, disturb_the_store, say_nothing
from tests.support.deployment import deployment, weights
from tests.support.fault_runs import LOCAL, ROUNDS, STEPS, WHAT, WHEN, Kind, check_end, kill, play_undisturbed, strike
from tests.support.faults_page import Page

pytestmark = [pytest.mark.long, pytest.mark.crash]

STRIKES = 3
KILLS_BETWEEN_ROUNDS = 3
SUSPICIOUS = {  # the quorum is the honest two, with mallory and without, so that neither is timed out on a slow machine
    "rounds": ROUNDS,
    "local": LOCAL,
    "server": {"quorum": 0.6, "absent_seconds": 3.0, "min_timeout_seconds": 5.0, "timeout_factor": 1.0, "strikes": STRIKES},
}


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    yield from play_undisturbed(tmp_path_factory.mktemp("memory"), "in memory", database=False)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    yield from play_undisturbed(tmp_path_factory.mktemp("private"), "ε = 8", {"epsilon": 8.0})


@pytest.mark.parametrize(("what", "when"), [("superlink", when) for when in WHEN] + [("server", "training")])
def test_killed_without_a_database(in_memory: Kind, page: Page, what: str, when: str) -> None:
    strike(in_memory, page, f"kill -9 of {what}", when, kill(in_memory, what))


@pytest.fixture(scope="module")
def with_mallory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    """undisturbed: without mallory."""
    with deployment(tmp_path_factory.mktemp("mallory"), "north", "south", plan=SUSPICIOUS, absent=("mallory",)) as fed:
        fed.run()
        yield Kind("with a database", fed, weights(fed.finish().load()))


def attack(kind: Kind, page: Page, what: str, deed: Deed, *options: str) -> list[dict[str, Any]]:
    """A run in each of whose rounds mallory does this, until it is left out. Returns what the events say of it."""
    fed = kind.fed
    struck = time.monotonic()
    with fed.attacker("mallory", dict.fromkeys(range(1, STRIKES + 1), deed)) as mallory:
        mallory.victim = fed.node_of("north")
        fed.wait(lambda: "mallory" in fed.online())
        fed.run(*options)
        check_end(kind, page, what, "every round", struck, "mallory, in the run's events")
    assert find_excluded(fed.newest(), fed.newest().load().history) == ["mallory"]
    told = [event for event in fed.events() if event.get("organization") == "mallory"]
    assert [event["event"] for event in told].count("delivery_failed") == 1  # who is left out is told of the end like everybody
    return [event for event in told if event["event"] != "delivery_failed"]


def test_a_member_says_nothing(with_mallory: Kind, page: Page) -> None:
    """On commit a605cba every round took the whole deadline, an hour by default."""
    told = attack(with_mallory, page, "mallory stays silent", say_nothing)
    assert [event["event"] for event in told] == ["update_dropped"] * 3 + ["client_excluded"]


def test_a_member_announces_answers_that_never_come(with_mallory: Kind, page: Page) -> None:
    told = attack(with_mallory, page, "mallory announces answers that never come", announce_and_stay_away)
    assert [event["event"] for event in told] == ["update_dropped"] * 3 + ["client_excluded"]


def test_a_member_sends_a_bomb(with_mallory: Kind, page: Page) -> None:
    """On commit a605cba the server ran out of memory, five times in a row, and the run was dead."""
    patient = ("--set", "server.min_timeout_seconds=240")  # none of it is late
    told = attack(with_mallory, page, "mallory sends 64 GiB in 1 MiB", bomb, *patient)
    assert [event["event"] for event in told] == ["update_quarantined"] * 3 + ["client_excluded"]


def test_a_member_disturbs_the_object_store(with_mallory: Kind, page: Page) -> None:
    """On commit a605cba all others were kept out, the server ended, and north trained at mallory's word."""
    sent = AuditLog(with_mallory.fed.site("north"))
    before = len(list(sent.entries()))
    told = attack(with_mallory, page, "mallory disturbs the object store", disturb_the_store)
    refused = [event["count"] for event in told if event["event"] == "messages_refused"]
    assert sum(refused) >= 2 * 3  # of three rounds; what is over the limit of bytes is refused before it is looked into
    updates = [entry for entry in list(sent.entries())[before:] if entry["what"] == "update"]
    assert [entry["round"] for entry in updates] == list(range(1, ROUNDS + 1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kept", ["with_database", "in_memory"])
def test_killed_again_and_again(request: pytest.FixtureRequest, page: Page, kept: str, seed: int) -> None:
    """Anyone who runs, at any moment, until the run is over; but not so often that no round ends in between.

    After five attempts without a finished round `server run` gives up, as it should: on a slow machine kills by the clock alone
    would come to that.
    """
    kind = request.getfixturevalue(kept)
    rng = random.Random(seed)
    times = 0
    kind.fed.run()
    struck = time.monotonic()
    rounds = 0
    since = 0
    while not kind.fed.ends_within(rng.uniform(0.5, 10.0)):
        if (finished := len(kind.fed.events("round_finished"))) > rounds:
            rounds = finished
            since = 0
        what = rng.choice(WHAT)
        if since < KILLS_BETWEEN_ROUNDS and kind.fed.get_running(what) is not None:
            kill(kind, what)()
            times += 1
            since += 1
    how_often = "once" if times == 1 else f"{times} times"
    check_end(kind, page, f"kill -9 of anybody, again and again ({seed + 1})", "at any time", struck, f"killed {how_often}")


@pytest.mark.parametrize(("what", "when"), list(itertools.product(("trainer:north", "north"), ("training", "sending"))))
def test_with_privacy_the_ledger_has_at_least_what_was_spent(private: Kind, page: Page, what: str, when: str) -> None:
    """Every step that a model has in it was charged before; a round that was cut off counts as spent."""
    fed = private.fed
    seed = str(len(page.new))  # another plan, as this one has had its budget
    strike(private, page, f"kill -9 of {what}", when, kill(private, what), "--set", f"seed={seed}")
    for name in fed.organizations:
        (data,) = summarize_ledger(Site(fed.site(name)))["collections"]
        (run,) = (run for run in data["runs"] if run["plan_id"] == fed.newest().plan.plan_id)
        assert run["rounds"] == ROUNDS
        assert run["steps"] >= ROUNDS * STEPS
        assert 0 < run["epsilon"] <= 8.0
