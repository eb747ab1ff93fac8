"""Every process killed at every moment, each in a run of its own: `make test-faults`, which writes docs/results/faults.md."""

from __future__ import annotations

import itertools
import signal
import time

import pytest

from tests.support.attackers import ADDRESSES, IDLE, flood, locked
from tests.support.deployment import bring_back
from tests.support.fault_runs import WHAT, WHEN, Kind, check_end, is_training, kill, strike
from tests.support.faults_page import Page

pytestmark = [pytest.mark.long, pytest.mark.crash]

LOCKED_SECONDS = 50.0


@pytest.mark.parametrize(("what", "when"), list(itertools.product(WHAT, WHEN)))
def test_killed(with_database: Kind, page: Page, what: str, when: str) -> None:
    strike(with_database, page, f"kill -9 of {what}", when, kill(with_database, what))


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
    fed.wait(lambda: is_training(fed))
    struck = time.monotonic()
    before = fed.find("superlink").memory_info().rss
    with flood(fed.port, fed.authority) as opened:
        fed.kill("north")
        fed.join("north")
        check_end(with_database, page, "connection flood of strangers", "training", struck, "their addresses, in the front's log")
    assert fed.find("superlink").memory_info().rss - before < 300 * 2**20
    assert all(opened[address] > IDLE for address in ADDRESSES)


def test_everybody_is_killed_at_once(with_database: Kind, page: Page) -> None:
    """As a power cut."""

    def fault() -> None:
        fed = with_database.fed
        for what in ("server", "run", *fed.organizations):
            fed.kill(what)
        for what in ("server", *fed.organizations, "run"):
            bring_back(fed, what)

    strike(with_database, page, "kill -9 of everybody", "training", fault)
