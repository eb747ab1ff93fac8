from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_INTRODUCTION = """# What may be killed, and what becomes of the run

Real processes on one machine, over TLS and with keys: `make test-faults`. Every line is a run of its own: four rounds of two
organisations on a tiny model, struck in the second, or again and again at random moments until the run is over. "Seconds" are from
the (first) fault to the end of the run, start of new processes included; they vary with the machine. "The same" compares every bit of the final model with that of a run in which nothing
happened, where no privacy noise makes every run another; then the ledgers have been checked to hold every step.

`trainer:north` is an organisation's training process, `north` its node, `server` is `cotune server start`, which keeps `superlink`,
`superexec` (Flower's executor) and `front` running, `serverapp` plays the run, and `run` is `cotune server run`. What is not supervised was
started again by the same command.

| fault | while | messages | seconds | all in all rounds | final model |
|---|---|---|---:|---|---|
"""


@dataclass
class Page:
    """docs/results/faults.md, line by line."""

    lines: list[str] = field(default_factory=list)

    def add(self, fault: str, moment: str, kind: str, seconds: float, complete: bool, same: bool | None) -> None:
        model = {True: "the same", False: "ANOTHER", None: "noisy; charged"}[same]
        self.lines.append(f"| {fault} | {moment} | {kind} | {seconds:.0f} | {'yes' if complete else 'NO'} | {model} |")


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    """Written to the file that the environment names."""
    made = Page()
    yield made
    if file := os.environ.get("FAULTS_PAGE"):
        Path(file).write_text(_INTRODUCTION + "\n".join(made.lines) + "\n", encoding="utf-8")
