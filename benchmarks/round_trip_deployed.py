"""How long is a deployed round that trains next to nothing: by the public port, directly at the SuperLink, and before a change?

    python benchmarks/round_trip_deployed.py [--organizations 2] [--rounds 20] [--times 3] [--before PYTHON]

Everything by cotune's own commands, over TLS and with keys: `server start`, `client join`, `server run`. The sides take turns,
`--times` times, each with a server and nodes of its own that end before the next begins. `--before` is the Python of another
installation of cotune, with its own public port. Seconds are those of `round_finished` in the run's events; the first two
rounds of a run, in which models are loaded, are left out. Prints a median for each turn, and the ratios of the medians of all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from cotune.simulations.comparison.workers import import_all

import_all([str(Path(__file__).resolve().parents[1] / "tests" / "support" / "loopback.py")])
from loopback import free_port, until, write_model, write_sentences  # noqa: E402

WARM = 2  # rounds in which models are loaded
PORT = "public port"
SUPERLINK = "SuperLink"
BEFORE = "before"
PERMISSIVE = "from cotune.privacy.policy import Policy, dump_policy; print(dump_policy(Policy.permissive()))"


@dataclass(frozen=True)
class Side:
    """python: whose cotune is run. direct: nodes go to the SuperLink, and not by the public port."""

    name: str
    folder: Path
    python: str
    organizations: tuple[str, ...]
    direct: bool

    @property
    def fed(self) -> Path:
        return self.folder / "fed"

    def do(self, *words: str | Path) -> str:
        done = subprocess.run(self.command(*words), cwd=self.folder, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cotune {' '.join(map(str, words[:2]))}: {done.stdout} {done.stderr}")
        return done.stdout

    def command(self, *words: str | Path) -> list[str]:
        return [self.python, "-m", "cotune.cli.main", *map(str, words)]

    @contextmanager
    def staying(self, name: str, *words: str | Path) -> Iterator[Callable[[], str]]:
        """A command for the length of the block. Yields what it has printed so far."""
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


def set_up(side: Side, rounds: int) -> None:
    side.folder.mkdir(parents=True)
    plan = {
        "rounds": rounds,
        "labels": ["bad", "good"],
        "privacy": "none",
        "model": {"base": str(write_model(side.folder / "base")), "max_length": 16, "pooling": "mean"},
        "data": {"source": "records.csv"},
        "strategy": "fedavg",
        "local": {"learning_rate": 1.0, "batch_size": 0.5, "steps": 2},
        "server": {"quorum": 1.0},
    }
    (side.folder / "plan.toml").write_text(tomli_w.dumps(plan), encoding="utf-8")
    ports = ("--port", str(free_port()), "--superlink-port", str(free_port()))
    side.do("server", "init", side.fed, "--plan", side.folder / "plan.toml", "--host", "localhost", "--device", "cpu", *ports)
    policy = subprocess.run([side.python, "-c", PERMISSIVE], capture_output=True, text=True, check=True).stdout
    for number, name in enumerate(side.organizations):
        write_sentences(side.folder / f"{name}.csv", number)
        side.do("client", "init", side.folder / name, "--name", name, "--device", "cpu")
        (side.folder / name / "policy.toml").write_text(policy, encoding="utf-8")
        side.do("server", "invite", side.fed, name, side.folder / name / "node.pub")
    given = (side.fed / "federation.toml").read_text(encoding="utf-8")
    if side.direct:
        given = given.replace(f"localhost:{ports[1]}", f"localhost:{ports[3]}")
    (side.folder / "federation.toml").write_text(given, encoding="utf-8")


def own_files(side: Side, name: str) -> tuple[str | Path, ...]:
    """Options of the first `client join`. Earlier versions read the base model where the plan says, and have no `--model`."""
    model = ("--model", side.folder / "base") if "--model" in side.do("client", "join", "--help") else ()
    return "--data", side.folder / f"{name}.csv", *model


def measure(side: Side) -> list[float]:
    """Seconds of the rounds of one run, without the first."""
    with ExitStack() as stack:
        said = stack.enter_context(side.staying("server", "server", "start", side.fed))
        until(lambda: "ready: " in said())
        for name in side.organizations:
            own = () if (side.folder / name / "data.json").exists() else own_files(side, name)
            stack.enter_context(side.staying(name, "client", "join", side.folder / name, side.folder / "federation.toml", *own))
        until(lambda: all(f"{name} is online" in said() for name in side.organizations))
        side.do("server", "run", side.fed)
    newest = max((side.fed / "runs").glob("*/events.jsonl"), key=lambda file: file.stat().st_mtime)
    events = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    return [float(event["seconds"]) for event in events if event["event"] == "round_finished"][WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organizations", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--before", metavar="PYTHON", help="of an installation of another cotune")
    given = parser.parse_args()
    names = tuple(f"org-{i + 1}" for i in range(given.organizations))
    with tempfile.TemporaryDirectory() as folder:
        pythons = {PORT: sys.executable, SUPERLINK: sys.executable, **({BEFORE: given.before} if given.before else {})}
        sides = [
            Side(name, Path(folder) / name.replace(" ", "-"), python, names, name == SUPERLINK)
            for name, python in pythons.items()
        ]
        for side in sides:
            set_up(side, given.rounds)
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        for turn in range(given.times):
            for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                found = measure(side)
                seconds[side.name] += found
                print(f"turn {turn + 1}  {side.name:12}  median {statistics.median(found):.3f} s", flush=True)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, median in medians.items():
        print(f"{name:12}  median {median:.3f} s  public port / {name}: {medians[PORT] / median:.2f}")


if __name__ == "__main__":
    main()
