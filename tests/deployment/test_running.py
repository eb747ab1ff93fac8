"""`cotune server run` with Flower's real programs and two organizations: through everything that may be killed, to the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from cotune.client.site_setup import make_site
from cotune.plan.load import parse_plan
from cotune.privacy.policy import Policy, dump_policy
from cotune.server.deployment.creation import create_federation
from cotune.server.deployment.federation import ServerConfig
from cotune.server.deployment.members import read_public_key
from cotune.server.runs.events import follow
from tests.support.datasets import sentences, write_csv
from tests.support.served import Served, free_port, runs, serving, until

pytestmark = pytest.mark.long

COTUNE = (sys.executable, "-m", "cotune.cli.main")


@dataclass
class Coordinator:
    """A federation that is served, and two organizations that have joined it."""

    served: Served
    logs: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.served.folder.path

    def start(self, log: str, *words: str | Path) -> subprocess.Popen[bytes]:
        with (self.logs / log).open("ab") as stream:
            command = [*COTUNE, *map(str, words)]
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "COLUMNS": "200"})
        self.started.append(process)
        return process

    def events(self, name: str) -> list[dict[str, Any]]:
        return follow(self.path / "runs" / name / "events.jsonl")[0]

    def until_round(self, name: str, round: int) -> None:
        def begun() -> bool:
            return any(event["event"] == "round_started" and event["round"] == round for event in self.events(name))

        until(begun, self.logs / "run.log")

    def player(self) -> psutil.Process:
        """The process that plays the run."""
        return next(each for each in self.served.descendants() if any("flwr-serverapp" in word for word in each.cmdline()))

    def status(self) -> dict[str, Any]:
        done = subprocess.run([*COTUNE, "server", "status", str(self.path), "--json"], capture_output=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, base_model: Callable[[str], Path]) -> Iterator[Coordinator]:
    folder = tmp_path_factory.mktemp("federation")
    base = base_model("bert")
    plan = {
        "name": "toy",
        "rounds": 3,
        "privacy": "none",
        "labels": ["bad", "good", "so"],
        "model": {"base": str(base), "max_length": 16, "pooling": "mean"},
        "data": {"source": "nowhere.csv"},
        "local": {"learning_rate": 1.0, "batch_size": 0.5, "steps": 700},
        "server": {"absent_seconds": 20},
    }
    config = ServerConfig(
        name="toy",
        hosts=("127.0.0.1",),
        listen="127.0.0.1",
        port=free_port(),
        superlink_port=free_port(),
        device="cpu",
        test=write_csv(folder / "test.csv", sentences(90, seed=9)),
    )
    federation = create_federation(folder / "fed", parse_plan(plan), config)
    with serving(federation) as served:
        made = Coordinator(served, folder)
        for i, name in enumerate(("hospital-a", "hospital-b")):
            site = folder / name
            records = write_csv(folder / f"{name}.csv", sentences(120, seed=i))
            make_site(site, name, device="cpu")
            (site / "policy.toml").write_text(dump_policy(Policy.permissive()), encoding="utf-8")
            federation.members.invite(name, read_public_key(site / "node.pub"))
            made.start(
                f"{name}.log", "client", "join", site, federation.path / "federation.toml", "--data", records, "--model", base
            )
        try:
            yield made
        finally:
            for process in made.started:
                process.terminate()
            for process in made.started:
                process.wait(600)


def test_run_survives_any_kill_and_ends_with_a_report(coordinator: Coordinator) -> None:
    """Killed in turn: the command, in round 1; the process that plays the run, in round 2."""
    path = coordinator.path
    first = coordinator.start("run.log", "server", "run", path, "--out", "one")
    coordinator.until_round("one", 1)
    first.kill()
    first.wait()
    again = coordinator.start("run.log", "server", "run", path, "--resume")
    coordinator.until_round("one", 2)
    assert sum(event["event"] == "run_started" for event in coordinator.events("one")) == 1
    coordinator.player().kill()
    log = (coordinator.logs / "run.log").read_text
    assert again.wait(600) == 0, log()
    resumed = [event["resumed_after"] for event in coordinator.events("one") if event["event"] == "run_started"]
    assert resumed == [0, 1]
    assert "hospital-b has the finished model" in log()
    summary = json.loads((path / "runs" / "one" / "summary.json").read_bytes())
    assert [entry["participants"] for entry in summary["rounds"]] == [["hospital-a", "hospital-b"]] * 3
    assert [(o["rounds"], o["delivered"]) for o in summary["organizations"]] == [(3, True), (3, True)]
    assert summary["test"]["federated"]["accuracy"] > summary["test"]["majority"]["accuracy"]
    status = coordinator.status()
    assert (status["run"]["phase"], status["run"]["round"]) == ("finished", 3)
    assert [(o["connection"], o["word"]) for o in status["organizations"]] == [("online", "has the finished model")] * 2


def test_a_run_is_stopped_by_ctrl_c_and_gone_on_with(coordinator: Coordinator) -> None:
    path = coordinator.path
    log = (coordinator.logs / "stopped.log").read_text
    begun = coordinator.start("stopped.log", "server", "run", path, "--out", "two")
    coordinator.until_round("two", 1)
    player = coordinator.player()
    begun.send_signal(signal.SIGINT)
    assert begun.wait(600) == 130, log()
    until(lambda: not runs(player), coordinator.logs / "stopped.log", 20.0)  # it has let go of the run, and may be ending yet
    assert "--resume" in log().splitlines()[-1]
    again = coordinator.start("stopped.log", "server", "run", path, "--resume")
    assert again.wait(600) == 0, log()
    one, two = ((path / "runs" / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two  # whatever happened on the way, without privacy
