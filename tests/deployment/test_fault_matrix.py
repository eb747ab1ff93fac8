"""Every process killed at every moment, each in a run of its own: `make test-faults`, which writes docs/results/faults.md."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from cotune.client.bookkeeping import overview
from cotune.client.site import Site
from tests.deployment.conftest import Page
from tests.deployment.deployment import Deployment, deployment, until, weights
from tests.deployment.test_faults import bring_back

pytestmark = pytest.mark.faults

ROUNDS, STRUCK = 5, 3  # the round in which it happens
LOCAL = {"learning_rate": 0.5, "batch_size": 0.5, "steps": 40}
WHAT = ("trainer:north", "north", "front", "serverapp", "superexec", "superlink", "server", "run")


@dataclass(frozen=True)
class Kind:
    """A federation whose runs are struck. undisturbed: the model without; None where noise makes each run another."""

    name: str
    fed: Deployment
    undisturbed: dict[str, bytes] | None


def _kind(folder: Path, name: str, privacy: object, *, database: bool = True) -> Iterator[Kind]:
    plan = {"rounds": ROUNDS, "local": LOCAL, "privacy": privacy}
    with deployment(folder / name, "north", "south", plan=plan, database=database) as fed:
        if privacy != "none":
            yield Kind(name, fed, None)
            return
        fed.run()
        yield Kind(name, fed, weights(fed.finish().load()))


@pytest.fixture(scope="module")
def with_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    yield from _kind(tmp_path_factory.mktemp("faults"), "with a database", "none")


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    yield from _kind(tmp_path_factory.mktemp("faults"), "in memory", "none", database=False)


def _training(fed: Deployment) -> bool:
    return any(event["round"] >= STRUCK for event in fed.events("round_started"))


def _sending(fed: Deployment) -> bool:
    """An update is finished, and on its way or about to be."""
    before = [event for event in fed.events("round_finished") if event["round"] == STRUCK - 1]
    outbox = fed.site("north") / "outbox" / "update.safetensors"
    return bool(before) and _training(fed) and outbox.stat().st_mtime > _at(fed, "round_started", STRUCK)


def _aggregating(fed: Deployment) -> bool:
    return any(event["round"] >= STRUCK for event in fed.events("update_received"))


def _checkpointing(fed: Deployment) -> bool:
    """The checkpoint is being written, or was just now."""
    folder = fed.newest().path / "checkpoints"
    written = any(folder.glob(f"*round-{STRUCK:05d}.safetensors*"))
    return _aggregating(fed) and written


def _at(fed: Deployment, event: str, round: int) -> float:
    return next(datetime.fromisoformat(e["at"]).timestamp() for e in fed.events(event) if e["round"] == round)


WHEN: dict[str, Callable[[Deployment], bool]] = {
    "training": _training,
    "sending": _sending,
    "aggregating": _aggregating,
    "checkpointing": _checkpointing,
}


def strike(kind: Kind, page: Page, what: str, when: str, fault: Callable[[], None]) -> None:
    """A run with the fault in it; it must end as if nothing had been."""
    fed = kind.fed
    fed.run()
    until(fed.reached("run_started", 0) if not fed.events("round_started") else lambda: True)
    until(lambda: WHEN[when](fed), what=f"round {STRUCK}, {when}")
    struck = time.monotonic()
    fault()
    run = fed.finish()
    seconds, history = time.monotonic() - struck, run.load().history
    complete = [entry["participants"] for entry in history] == [list(fed.organisations)] * ROUNDS
    same = kind.undisturbed is None or weights(run.load()) == kind.undisturbed
    page.add(what, when, kind.name, seconds, complete, same)
    assert complete
    assert same


@pytest.mark.parametrize(("what", "when"), list(itertools.product(WHAT, WHEN)))
def test_killed(with_database: Kind, page: Page, what: str, when: str) -> None:
    def fault() -> None:
        with_database.fed.kill(what)
        bring_back(with_database.fed, what)

    strike(with_database, page, f"kill -9 of {what}", when, fault)


@pytest.mark.parametrize(("what", "when"), list(itertools.product(("superlink", "server"), WHEN)))
def test_killed_without_a_database(in_memory: Kind, page: Page, what: str, when: str) -> None:
    def fault() -> None:
        in_memory.fed.kill(what)
        bring_back(in_memory.fed, what)

    strike(in_memory, page, f"kill -9 of {what}", when, fault)


@pytest.mark.parametrize("what", ["front", "superlink", "north"])
def test_stalled_for_more_than_a_minute(with_database: Kind, page: Page, what: str) -> None:
    """As a cut of the network, or a machine that sleeps: nobody says anything, and connections stay open."""

    def fault() -> None:
        process = with_database.fed.find(what)
        process.send_signal(signal.SIGSTOP)
        time.sleep(70)
        process.send_signal(signal.SIGCONT)

    strike(with_database, page, f"{what} stands still for 70 s", "training", fault)


def test_everybody_is_killed_at_once(with_database: Kind, page: Page) -> None:
    """As a power cut."""

    def fault() -> None:
        fed = with_database.fed
        for what in ("server", "superlink", "superexec", "serverapp", "front", "north", "south", "run"):
            fed.kill(what)
        for what in ("server", "north", "south", "run"):
            bring_back(fed, what)

    strike(with_database, page, "kill -9 of everybody", "training", fault)


@pytest.mark.parametrize(("what", "when"), list(itertools.product(("trainer:north", "north"), WHEN)))
def test_with_privacy_the_ledger_has_at_least_what_was_spent(tmp_path: Path, page: Page, what: str, when: str) -> None:
    """Every step that a model has in it was charged before; a round that was cut off counts as spent."""
    for private in _kind(tmp_path, "ε = 8", {"epsilon": 8.0}):
        fed = private.fed

        def fault() -> None:
            fed.kill(what)  # noqa: B023  # called before the loop goes on
            bring_back(fed, what)  # noqa: B023

        strike(private, page, f"kill -9 of {what}", when, fault)
        for name in fed.organisations:
            (data,) = overview(Site(fed.site(name)))["data_sets"]
            (run,) = data["runs"]
            assert run["rounds"] == ROUNDS
            assert run["steps"] >= ROUNDS * LOCAL["steps"]
            assert 0 < data["epsilon"] <= 8.0
