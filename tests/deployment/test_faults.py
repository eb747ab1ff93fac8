"""Whatever is killed: the same command again goes on, and the model is the same, bit by bit. Real processes, TLS and keys.

The short form is one run in which everything is killed once. The long form (`make test-faults`) kills every process at several
moments in runs of their own, with and without the SuperLink's database, cuts the network, and writes docs/results/faults.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deployment.deployment import Deployment, deployment, weights

ROUNDS = 16
PLAN = {"rounds": ROUNDS, "local": {"learning_rate": 0.5, "batch_size": 0.5, "steps": 20}}


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("faults"), "north", "south", plan=PLAN) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(fed: Deployment) -> dict[str, bytes]:
    """The model of a run in which nothing is killed."""
    fed.run()
    return weights(fed.finish().load())


def bring_back(fed: Deployment, what: str) -> None:
    """By the same command again; what `server start` supervises comes back by itself."""
    if what == "server":
        fed.start_server()
    elif what == "run":
        fed.run("--resume")
    elif what in fed.organisations:
        fed.join(what)


def test_everything_is_killed_once(fed: Deployment, undisturbed: dict[str, bytes]) -> None:
    kills = ("trainer:north", "south", "front", "serverapp", "superexec", "superlink", "run", "server")
    # `server` last: what it leaves behind plays on until it is back, on a slow machine to the end of the run
    fed.run()
    for round, what in enumerate(kills, start=1):
        fed.wait(fed.reached("round_started", round))
        fed.kill(what)
        bring_back(fed, what)
    run = fed.finish()
    history = run.load().history
    assert len({event["at"] for event in fed.events("run_started")}) >= 3  # by the ServerApp that was killed, and those after it
    assert [entry["round"] for entry in history] == list(range(1, ROUNDS + 1))
    assert all(entry["participants"] == ["north", "south"] for entry in history)
    assert weights(run.load()) == undisturbed
