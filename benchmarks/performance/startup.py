"""How long is it until a command answers that needs no model?

CPU seconds and peak memory of whole processes, against a Python that imports the two libraries which every command needs,
Pydantic and Typer. The site and the federation that are looked at are new and empty.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import inputs
from harness import Benchmark, Contender, Figure, Meter, Results, Row

FLOOR = "python -c 'import pydantic, typer'"
COMMANDS = {
    "--help": ("--help",),
    "plan check": ("plan", "check", "plan.toml"),
    "plan new": ("plan", "new", "tweets"),
    "client policy": ("client", "policy", "site"),
    "client ledger": ("client", "ledger", "site"),
    "server status": ("server", "status", "fed"),
}


def run(meter: Meter, folder: Path, smoke: bool, words: tuple[str, ...]) -> None:
    """One process: its CPU seconds, wall seconds and peak memory, as the kernel counts them."""
    began = time.perf_counter()
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words[-3:])}: {said[-200:]}")
    wall = time.perf_counter() - began
    meter.add(cpu=usage.ru_utime + usage.ru_stime, wall=wall, memory=usage.ru_maxrss * 1024.0)


def command(words: tuple[str, ...]) -> tuple[str, ...]:
    return (sys.executable, "-m", "cotune.cli.main", *words)


def setup(folder: Path, smoke: bool) -> None:
    base = inputs.write_encoder(folder / "base", 16)
    source = inputs.write_records(folder / "records.csv", 400)
    inputs.write_plan(
        folder / "plan.toml",
        labels=[f"c{number}" for number in range(10)],
        rounds=2,
        model={"base": str(base), "max_length": 16, "pooling": "mean"},
        data={"source": str(source)},
        local={"batch_size": 0.2, "steps": 2},
    )
    for words in (
        ("client", "init", "site", "--name", "hospital", "--device", "cpu"),
        ("server", "init", "fed", "--plan", "plan.toml", "--host", "localhost", "--device", "cpu"),
    ):
        done = subprocess.run(command(words), cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cotune {' '.join(words)}: {done.stdout} {done.stderr}")


def rows(results: Results) -> list[Row]:
    seconds = Figure("cpu", "s CPU", 1.0)
    memory = Figure("memory", "MB", 1e-6)
    found = [results.row("CPU until it ends", FLOOR, seconds)]
    for name in COMMANDS:
        goal = "" if name in ("plan new", "client policy") else "≤ 3 ×"
        reached = (lambda _, ratio: ratio <= 3) if goal else None
        found.append(results.row("CPU until it ends", f"cotune {name}", seconds, against=FLOOR, goal=goal, reached=reached))
    found.append(results.row("peak memory", FLOOR, memory))
    found += [results.row("peak memory", f"cotune {name}", memory, against=FLOOR) for name in COMMANDS]
    return found


BENCHMARK = Benchmark(
    name="startup",
    number=10,
    title="Start of commands",
    contenders=(
        Contender(FLOOR, partial(run, words=(sys.executable, "-c", "import pydantic, typer"))),
        *(
            Contender(
                f"cotune {name}",
                partial(run, words=command(words)),
                repeats=1 if name == "plan check" else None,  # loads the plan's model, and times it
                in_smoke=name == "--help",
            )
            for name, words in COMMANDS.items()
        ),
    ),
    rows=rows,
    setup=setup,
)
