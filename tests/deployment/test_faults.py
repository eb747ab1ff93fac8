"""Whatever is killed: the same command again goes on, and the model is the same, bit by bit. Real processes, TLS and keys.

The short form is one run in which processes are killed while the database is locked and the port flooded; the model is compared
with that of a simulation of the same plan on the same records. The long form
(`make test-faults`) kills every process once in one run, and lets a member attack; test_fault_matrix.py kills each in runs of
their own, at several moments, with and without the SuperLink's database; it cuts the network, and writes docs/results/faults.md.
That who sends bombs is left out, and what the proxy lets nobody do in another's place, is shown without processes in
tests/server/rounds and tests/server/proxy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from cotune.flower.fleet_client import AnnouncedRequest, FleetClient
from cotune.server.runs.exclusions import find_excluded
from tests.support.attackers import ADDRESSES, DISTURBANCES, IDLE, Attacker, bomb, disturb_the_store, flood, locked
from tests.support.deployment import Deployment, bring_back, deployment, play_in_process, weights

ROUNDS = 4
PLAN = {"rounds": ROUNDS, "local": {"learning_rate": 0.5, "batch_size": 0.5, "steps": 10}}
EVERYTHING = ("trainer:north", "south", "front", "serverapp", "superexec", "superlink", "run", "server")
pytestmark = pytest.mark.crash


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("faults"), "north", "south", plan=PLAN) as made:
        yield made


def undisturbed(fed: Deployment, rounds: int) -> dict[str, bytes]:
    """The model of a run in which nothing is killed."""
    fed.run("--set", f"rounds={rounds}")
    return weights(fed.finish().load())


def check_whole(fed: Deployment, rounds: int, expected: dict[str, bytes]) -> None:
    """The run that ended last lost no round, nobody, and not a bit."""
    run = fed.finish()
    history = run.load().history
    assert [entry["round"] for entry in history] == list(range(1, rounds + 1))
    assert all(entry["participants"] == ["north", "south"] for entry in history)
    assert weights(run.load()) == expected


def test_kills_a_locked_database_and_a_flood_change_nothing(fed: Deployment) -> None:
    """SQLite waits for 5 s. In the flood a node is killed and joins again."""
    fed.run()
    fed.wait(fed.reached("round_started", 1))
    with locked(fed.database):
        fed.kill("trainer:north")
        time.sleep(6)
    fed.wait(fed.reached("round_started", 2))
    with flood(fed.port, fed.authority) as opened:
        fed.kill("south")  # without it no round ends, so that the flood has the time that it needs
        fed.wait(lambda: all(opened[address] > IDLE for address in ADDRESSES))
        fed.join("south")
        fed.wait(fed.reached("round_started", 3))
    fed.kill("serverapp")
    check_whole(fed, ROUNDS, play_in_process(fed, ROUNDS))
    assert len({event["at"] for event in fed.events("run_started")}) >= 2  # by the ServerApp that was killed, and one after it


@pytest.mark.long
def test_everything_is_killed_once(fed: Deployment) -> None:
    rounds = 2 * len(EVERYTHING)
    expected = undisturbed(fed, rounds)
    fed.run("--set", f"rounds={rounds}")
    for round, what in enumerate(EVERYTHING, start=1):
        fed.wait(fed.reached("round_started", round))
        fed.kill(what)
        bring_back(fed, what)
    check_whole(fed, rounds, expected)
    assert len({event["at"] for event in fed.events("run_started")}) >= 3  # by the ServerApp that was killed, and those after it


@pytest.mark.long
def test_the_database_is_locked_and_the_port_flooded(fed: Deployment) -> None:
    fed.run("--set", "rounds=3")
    fed.wait(fed.reached("round_started", 2))
    with locked(fed.database):
        time.sleep(8)
    with flood(fed.port, fed.authority) as opened:
        fed.kill("north")
        fed.join("north")
        history = fed.finish().load().history
    assert [entry["participants"] for entry in history] == [["north", "south"]] * 3
    assert all(opened[address] > IDLE for address in ADDRESSES)


@pytest.mark.long
def test_a_member_that_attacks_is_named_and_left_out(fed: Deployment) -> None:
    """It disturbs the object store, and sends bombs, in south's place."""

    def disturb_and_bomb(attacker: Attacker, fleet: FleetClient, request: AnnouncedRequest) -> None:
        disturb_the_store(attacker, fleet, request)
        bomb(attacker, fleet, request)

    fed.leave("south")
    with fed.attacker("south", {1: disturb_and_bomb, 2: bomb, 3: bomb}) as attacker:
        attacker.victim = fed.node_of("north")
        fed.wait(lambda: "south" in fed.online())
        fed.run("--set", "rounds=4", "--set", "server.quorum=0.5")
        run = fed.finish()
    history = run.load().history
    assert [entry["participants"] for entry in history] == [["north"]] * 4
    assert [entry["quarantined"] for entry in history] == [["south"]] * 3 + [[]]
    assert find_excluded(run, history) == ["south"]
    assert attacker.answers == [*DISTURBANCES, httpx.codes.OK, httpx.codes.OK, httpx.codes.OK]
    assert sum(event["count"] for event in fed.events("messages_refused") if event["organization"] == "south") >= 1
