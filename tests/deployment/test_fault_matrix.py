"""Every process killed at every moment, each in a run of its own: `make test-faults`, which writes docs/results/faults.md."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cotune.client.audit_log import AuditLog
from cotune.client.ledger_report import summarize_ledger
from cotune.client.site import Site
from cotune.server.runs.exclusions import find_excluded
from tests.support.attackers import (
    ADDRESSES,
    IDLE,
    Deed,
    announce_and_stay_away,
    bomb,
    disturb_the_store,
    flood,
    locked,
    say_nothing,
)
from tests.support.deployment import Deployment, bring_back, deployment, weights
from tests.support.faults_page import Page

pytestmark = [pytest.mark.long, pytest.mark.crash]

# STRUCK: the round in which it happens
ROUNDS = 4
STRUCK = 2
STEPS = 40
LOCAL = {"learning_rate": 0.5, "batch_size": 0.5, "steps": STEPS}
STRIKES = 3
KILLS_BETWEEN_ROUNDS = 3
SUSPICIOUS = {  # the quorum is the honest two, with mallory and without, so that neither is timed out on a slow machine
    "rounds": ROUNDS,
    "local": LOCAL,
    "server": {"quorum": 0.6, "absent_seconds": 3.0, "min_timeout_seconds": 5.0, "timeout_factor": 1.0, "strikes": STRIKES},
}
LOCKED_SECONDS = 50.0
WHAT = ("trainer:north", "north", "front", "serverapp", "superexec", "superlink", "server", "run")


@dataclass(frozen=True)
class Kind:
    """A federation whose runs are struck. undisturbed: the model without; None where noise makes each run another."""

    name: str
    fed: Deployment
    undisturbed: dict[str, bytes] | None


def _kind(folder: Path, name: str, privacy: object = "none", *, database: bool = True) -> Iterator[Kind]:
    plan = {"rounds": ROUNDS, "local": LOCAL, "privacy": privacy}
    with deployment(folder, "north", "south", plan=plan, database=database) as fed:
        if privacy != "none":
            yield Kind(name, fed, None)
            return
        fed.run()
        yield Kind(name, fed, weights(fed.finish().load()))


@pytest.fixture(scope="module")
def with_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    yield from _kind(tmp_path_factory.mktemp("database"), "with a database")


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    yield from _kind(tmp_path_factory.mktemp("memory"), "in memory", database=False)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    yield from _kind(tmp_path_factory.mktemp("private"), "ε = 8", {"epsilon": 8.0})


def _training(fed: Deployment) -> bool:
    return any(event["round"] >= STRUCK for event in fed.events("round_started"))


def _sending(fed: Deployment) -> bool:
    """An update is finished, and on its way or about to be."""
    begun = next((e["at"] for e in fed.events("round_started") if e["round"] == STRUCK), None)
    outbox = fed.site("north") / "outbox" / "update.safetensors"
    return begun is not None and outbox.stat().st_mtime > datetime.fromisoformat(begun).timestamp()


def _aggregating(fed: Deployment) -> bool:
    return any(event["round"] >= STRUCK for event in fed.events("update_received"))


def _checkpointing(fed: Deployment) -> bool:
    """The checkpoint is being written, or was just now."""
    return any((fed.newest().path / "checkpoints").glob(f"*round-{STRUCK:05d}.safetensors*"))


WHEN: dict[str, Callable[[Deployment], bool]] = {
    "training": _training,
    "sending": _sending,
    "aggregating": _aggregating,
    "checkpointing": _checkpointing,
}


def strike(kind: Kind, page: Page, what: str, when: str, fault: Callable[[], None], *options: str) -> None:
    """A run with the fault in it; it must end as if nothing had been."""
    kind.fed.run(*options)
    kind.fed.wait(lambda: WHEN[when](kind.fed))
    struck = time.monotonic()
    fault()
    check_end(kind, page, what, when, struck)


def check_end(kind: Kind, page: Page, what: str, when: str, struck: float, shown: str = "–") -> None:
    run = kind.fed.finish()
    seconds = time.monotonic() - struck
    history = run.load().history
    complete = [entry["participants"] for entry in history] == [list(kind.fed.organizations)] * ROUNDS
    same = None if kind.undisturbed is None else weights(run.load()) == kind.undisturbed
    page.add(what, when, kind.name, seconds, complete, same, shown)
    assert complete
    assert same in (True, None)


def kill(kind: Kind, what: str) -> Callable[[], None]:
    def fault() -> None:
        kind.fed.kill(what)
        bring_back(kind.fed, what)

    return fault


@pytest.mark.parametrize(("what", "when"), list(itertools.product(WHAT, WHEN)))
def test_killed(with_database: Kind, page: Page, what: str, when: str) -> None:
    strike(with_database, page, f"kill -9 of {what}", when, kill(with_database, what))


@pytest.mark.parametrize(("what", "when"), [("superlink", when) for when in WHEN] + [("server", "training")])
def test_killed_without_a_database(in_memory: Kind, page: Page, what: str, when: str) -> None:
    strike(in_memory, page, f"kill -9 of {what}", when, kill(in_memory, what))


@pytest.mark.parametrize("what", ["front", "superlink", "north"])
def test_stands_still_for_more_than_a_minute(with_database: Kind, page: Page, what: str) -> None:
    """As a cut of the network, or a machine that sleeps: nobody says anything, and connections stay open."""

    def fault() -> None:
        process = with_database.fed.find(what)
        process.send_signal(signal.SIGSTOP)
        time.sleep(70)
        process.send_signal(signal.SIGCONT)

    strike(with_database, page, f"{what} stands still for 70 s", "training", fault)


@pytest.mark.parametrize("when", WHEN)
def test_the_database_is_locked(with_database: Kind, page: Page, when: str) -> None:
    """As by a backup: whatever the SuperLink writes meanwhile fails after 5 s. On commit a605cba its server ended for good."""

    def fault() -> None:
        with locked(with_database.fed.database):
            time.sleep(LOCKED_SECONDS)

    strike(with_database, page, f"database locked for {LOCKED_SECONDS:g} s", when, fault)


def test_strangers_flood_the_port(with_database: Kind, page: Page) -> None:
    """320 idle connections of four addresses, opened again whenever they are cut, and contents of 16 MB under an unknown key, all
    the time; meanwhile a node is killed and joins again. On commit a605cba nobody could join any more, and the SuperLink took 3.8 GB.
    """
    fed = with_database.fed
    fed.run()
    fed.wait(lambda: _training(fed))
    struck = time.monotonic()
    before = fed.find("superlink").memory_info().rss
    with flood(fed.port, fed.authority) as opened:
        fed.kill("north")
        fed.join("north")
        check_end(with_database, page, "connection flood of strangers", "training", struck, "their addresses, in the front's log")
    assert fed.find("superlink").memory_info().rss - before < 300 * 2**20
    assert all(opened[address] > IDLE for address in ADDRESSES)


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


def test_everybody_is_killed_at_once(with_database: Kind, page: Page) -> None:
    """As a power cut."""

    def fault() -> None:
        fed = with_database.fed
        for what in ("server", "run", *fed.organizations):
            fed.kill(what)
        for what in ("server", *fed.organizations, "run"):
            bring_back(fed, what)

    strike(with_database, page, "kill -9 of everybody", "training", fault)


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
    seed = str(page.added)  # another plan, as this one has had its budget
    strike(private, page, f"kill -9 of {what}", when, kill(private, what), "--set", f"seed={seed}")
    for name in fed.organizations:
        (data,) = summarize_ledger(Site(fed.site(name)))["collections"]
        (run,) = (run for run in data["runs"] if run["plan_id"] == fed.newest().plan.plan_id)
        assert run["rounds"] == ROUNDS
        assert run["steps"] >= ROUNDS * STEPS
        assert 0 < run["epsilon"] <= 8.0
