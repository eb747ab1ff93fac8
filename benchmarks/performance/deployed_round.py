"""How long is a deployed round that trains next to nothing?

A real federation on this machine, with real processes, TLS and keys: a SuperLink, a server, and three organizations whose tiny
model takes milliseconds to train. The same plan on cotune's resident nodes (one process that keeps the model), and on Flower's
own `flower-supernode`, started by `flwr run`, which starts a process for every message. A third way is a federation by cotune's
own commands (`server start`, `client join`, `server run`), whose traffic passes the public port in front of the SuperLink.

Wall seconds of whole rounds, from the run's own record, without the first two, in which models are loaded; CPU time is spread
over many processes and is not told.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import tomli_w
from harness import HERE, Benchmark, Contender, Figure, Meter, Results, Row

WARM = 2  # rounds in which models are loaded
ORGANIZATIONS = 3
PERMISSIVE = "from cotune.privacy.policy import Policy, dump_policy; print(dump_policy(Policy.permissive()))"


def _loopback() -> ModuleType:
    """The module with a federation on this machine, which is that of the deployment tests.

    Folders of this project on `sys.path` would hide other modules, and some package has installed a `tests` of its own. So the
    name stands for the folder here.
    """
    if "tests.support" not in sys.modules:
        tests = ModuleType("tests")
        tests.__path__ = [str(HERE.parents[1] / "tests")]
        sys.modules["tests"] = tests
    return importlib.import_module("tests.support.loopback")


def nodes(meter: Meter, folder: Path, smoke: bool, stock: bool) -> None:
    """The round loop as an app on a SuperLink, and nodes that connect to it directly."""
    import tempfile

    loopback = _loopback()

    organizations = 1 if smoke else ORGANIZATIONS
    rounds = WARM + (1 if smoke else 2 if stock else 12)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run = loopback.prepare_run(Path(place) / "run", organizations, rounds)
        with loopback.federation(Path(place) / "loopback", organizations) as made:
            start = made.start_stock_node if stock else made.start_node
            for number, participant in enumerate(run.file.participants):
                start(number, run.path / participant.site)
            loopback.until(lambda: made.online() == organizations, 300.0)
            made.submit(run.path)
            loopback.until(lambda: run.finished, 120.0 * rounds)
        for entry in run.load().history[WARM:]:
            meter.add(wall=float(entry["seconds"]))


def commands(meter: Meter, folder: Path, smoke: bool) -> None:
    """All by cotune's commands; nodes and the run pass the public port."""
    import tempfile

    until = _loopback().until

    rounds = WARM + (1 if smoke else 12)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        names = tuple(f"org-{number + 1}" for number in range(1 if smoke else ORGANIZATIONS))
        side = Side(Path(place), names)
        side.set_up(rounds)
        with ExitStack() as stack:
            printed = stack.enter_context(side.staying("server", "server", "start", side.fed))
            until(lambda: "ready: " in printed(), 300.0)
            for name in names:
                own = ("--data", side.folder / f"{name}.csv", "--model", side.folder / "base")
                stack.enter_context(side.staying(name, "client", "join", side.folder / name, side.fed / "federation.toml", *own))
            until(lambda: all(f"{name} is online" in printed() for name in names), 300.0)
            side.do("server", "run", side.fed)
        newest = max((side.fed / "runs").glob("*/events.jsonl"), key=lambda file: file.stat().st_mtime)
        events = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
        for event in [event for event in events if event["event"] == "round_finished"][WARM:]:
            meter.add(wall=float(event["seconds"]))


@dataclass(frozen=True)
class Side:
    """A federation in a folder, run by commands."""

    folder: Path
    organizations: tuple[str, ...]

    @property
    def fed(self) -> Path:
        return self.folder / "fed"

    def set_up(self, rounds: int) -> None:
        """Found the federation, and make and invite its organizations."""
        loopback = _loopback()
        plan = {
            "rounds": rounds,
            "labels": ["bad", "good"],
            "privacy": "none",
            "model": {"base": str(loopback.write_model(self.folder / "base")), "max_length": 16, "pooling": "mean"},
            "data": {"source": "records.csv"},
            "strategy": "fedavg",
            "local": {"learning_rate": 1.0, "batch_size": 0.5, "steps": 2},
            "server": {"quorum": 1.0},
        }
        (self.folder / "plan.toml").write_text(tomli_w.dumps(plan), encoding="utf-8")
        ports = ("--port", str(loopback.free_port()), "--superlink-port", str(loopback.free_port()))
        self.do("server", "init", self.fed, "--plan", self.folder / "plan.toml", "--host", "localhost", "--device", "cpu", *ports)
        policy = subprocess.run([sys.executable, "-c", PERMISSIVE], capture_output=True, text=True, check=True).stdout
        for number, name in enumerate(self.organizations):
            loopback.write_sentences(self.folder / f"{name}.csv", number)
            self.do("client", "init", self.folder / name, "--name", name, "--device", "cpu")
            (self.folder / name / "policy.toml").write_text(policy, encoding="utf-8")
            self.do("server", "invite", self.fed, name, self.folder / name / "node.pub")

    def do(self, *words: str | Path) -> str:
        """Run a command to its end. Raises RuntimeError with its output when it fails."""
        done = subprocess.run(self.command(*words), cwd=self.folder, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cotune {' '.join(map(str, words[:2]))}: {done.stdout} {done.stderr}")
        return done.stdout

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "cotune.cli.main", *map(str, words)]

    @contextmanager
    def staying(self, name: str, *words: str | Path) -> Iterator[Callable[[], str]]:
        """Run a command for the length of the block. Yields what gives all that it has printed so far."""
        file = self.folder / f"{name}.log"
        with file.open("wb") as log:
            process = subprocess.Popen(
                self.command(*words), cwd=self.folder, env=environment(), stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield lambda: file.read_text(encoding="utf-8", errors="replace")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


STOCK = "flower-supernode + flwr run"


def rows(results: Results) -> list[Row]:
    wall = Figure("wall", "s wall", 1.0)
    what = f"a trivial round, {ORGANIZATIONS} organizations"
    return [
        results.row(what, STOCK, wall),
        results.row(what, "cotune's nodes", wall, against=STOCK, goal="≥ 8 × faster", reached=lambda _, ratio: ratio <= 1 / 8),
        results.row(what, "cotune, public port", wall, against=STOCK),
    ]


BENCHMARK = Benchmark(
    name="deployed_round",
    number=7,
    title="A deployed round",
    contenders=(
        Contender("cotune's nodes", partial(nodes, stock=False)),
        Contender(STOCK, partial(nodes, stock=True), in_smoke=False),
        Contender("cotune, public port", commands, in_smoke=False),
    ),
    rows=rows,
    repeats=1,
)
