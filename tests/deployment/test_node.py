"""TrainerProcess nodes and a real SuperLink, with TLS and keys, through everything that may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotune.server.runs.events import read_events
from cotune.server.runs.run_folder import RunFolder
from tests.support.loopback import Federation, federation, prepare_run, until

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the training processes in /proc"),
]


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two organizations whose nodes stay for all tests, and a SuperLink with a database."""
    folder = tmp_path_factory.mktemp("federation")
    with federation(folder / "loopback", 2, "--database", folder / "superlink.sqlite") as made:
        yield made


def start(fed: Federation, run: RunFolder, number: int) -> subprocess.Popen[bytes]:
    return fed.start_node(number, run.path / run.file.participants[number].site)


def trainer(node: subprocess.Popen[bytes]) -> int:
    """The pid of a node's training process."""
    return next(pid for pid, parent, words in _processes() if parent == node.pid and "spawn_main" in words)


def alive(pid: int) -> bool:
    return any(pid == other for other, _, _ in _processes())


def _processes() -> Iterator[tuple[int, int, str]]:
    """pid, parent, command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            words = (folder / "cmdline").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if fields[0] != "Z":
            yield int(folder.name), int(fields[1]), words


def log(fed: Federation, number: int) -> str:
    return (fed.folder / f"node-{number}.log").read_text(encoding="utf-8")


def begun(fed: Federation, number: int, round: int) -> Callable[[], bool]:
    """Whether a node is at a round."""
    return lambda: any(f"round {round} of run" in line and "begins" in line for line in log(fed, number).splitlines())


def told(run: RunFolder, event: str) -> list[dict[str, Any]]:
    file = run.path / "events.jsonl"
    return [line for line in read_events(file) if line["event"] == event] if file.exists() else []


def test_run_survives_killed_training_and_node_processes(fed: Federation, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Round 1: undisturbed. 2: a training process is killed. 3: a node is killed and started again. 4: undisturbed."""
    run = prepare_run(tmp_path_factory.mktemp("run") / "killed", 2, rounds=4, steps=1500)
    nodes = [start(fed, run, number) for number in range(2)]
    until(lambda: fed.online() == 2)  # while one is there alone, it is asked for both
    fed.submit(run.path)
    until(begun(fed, 0, 2))
    os.kill(trainer(nodes[0]), signal.SIGKILL)
    until(begun(fed, 1, 3))
    orphan = trainer(nodes[1])
    nodes[1].kill()
    nodes[1].wait()
    until(lambda: not alive(orphan), 10)
    start(fed, run, 1)
    until(lambda: run.finished)
    both = [participant.name for participant in run.file.participants]
    history = run.load().history
    assert [entry["participants"] for entry in history] == [both, both, both, both]
    assert "the training process ended with -9" in log(fed, 0)


def restart_superlink(fed: Federation, *options: str | Path) -> None:
    fed.processes["superlink"].kill()
    fed.processes["superlink"].wait()
    fed.start_superlink(*options)


def test_superlink_returns_with_and_without_its_database(fed: Federation, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The nodes of the test before come back by themselves; without the database as soon as their keys are registered again.

    Then they refuse a run whose bundle holds code.
    """
    restart_superlink(fed, "--database", fed.folder.parent / "superlink.sqlite")
    until(lambda: log(fed, 0).count("connected as node") == 2)
    first, second = (line.split()[-1] for line in log(fed, 0).splitlines() if "connected as node" in line)
    assert first == second
    restart_superlink(fed)
    until(lambda: "the server does not accept the key" in log(fed, 0) or "does not let this node in" in log(fed, 0))
    fed.register()
    until(lambda: fed.online() == 2)
    run = prepare_run(tmp_path_factory.mktemp("run") / "foreign", 2, rounds=1)
    fed.submit(run.path, bundled={"evil.py": "raise SystemExit\n"})
    until(lambda: bool(told(run, "run_failed")))
    reasons = [event["reason"] for event in told(run, "update_dropped")]
    assert len(reasons) == 2
    assert all(reason.startswith("the run's bundle holds 'evil.py': expected configuration only") for reason in reasons)


def test_a_stopped_node_leaves_nobody_and_says_so(fed: Federation) -> None:
    for number in range(2):
        node = fed.processes[f"node-{number}"]
        training = trainer(node)
        node.send_signal(signal.SIGTERM)
        assert node.wait(600) == 0
        assert not alive(training)
    assert fed.online() == 0
