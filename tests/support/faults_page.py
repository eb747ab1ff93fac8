"""docs/results/faults.md, line by line."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from cotune.storage.files import exclusive_lock

_INTRODUCTION = """# What may be killed, who may attack, and what becomes of the run

Real processes on one machine, over TLS and with keys: `make test-faults`. Every line is a run of its own: four rounds of two
organizations on a tiny model, struck in the second, or again and again until the run is over. "Seconds" are from
the (first) fault to the end of the run, start of new processes included, and of the whole run where it attacks "every round"; they vary with the machine
(three runs at a time on two cores that others used, too). "All in all rounds" is of the
organizations that are honest. "The same" compares every bit of the final model with that of a run in which nothing
happened (where a third member attacks: of one in which that member stayed away), where no privacy noise makes every run another;
then the ledgers have been checked to hold every step. Lines that were not run again keep the day on which they were.

`trainer:north` is an organization's training process, `north` its node, `server` is `cotune server start`, which keeps `superlink`,
`superexec` (Flower's executor) and `front` running, `serverapp` plays the run, and `run` is `cotune server run`. What is not supervised was
started again by the same command. `mallory` is a member that has its key, and uses it in a program of its own.

| fault | while | messages | seconds | all in all rounds | final model | shown | day |
|---|---|---|---:|---|---|---|---|
"""


_CELLS = 8
_KEY = 3  # fault, while, messages: what a line is of


@dataclass
class Page:
    """docs/results/faults.md, line by line."""

    lines: dict[tuple[str, ...], str] = field(default_factory=dict)
    new: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Page:
        """With the lines that are there, to be kept until they are added again."""
        rows = [line.strip("| ").split(" | ") for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        kept = [row for row in rows if len(row) == _CELLS and re.fullmatch(r"\d+", row[3])]
        return cls({tuple(row[:_KEY]): f"| {' | '.join(row)} |" for row in kept})

    def add(
        self, fault: str, moment: str, kind: str, seconds: float, complete: bool, same: bool | None, shown: str = "–"
    ) -> None:
        """shown: whom the run's events name, or what else is worth telling."""
        model = {True: "the same", False: "ANOTHER", None: "noisy; charged"}[same]
        cells = [fault, moment, kind, f"{seconds:.0f}", "yes" if complete else "NO", model, shown, f"{date.today()}"]
        self.lines[fault, moment, kind] = f"| {' | '.join(cells)} |"
        self.new.append((fault, moment, kind))

    def write(self, file: Path) -> None:
        """Write it with the lines that other processes have added since it was read."""
        with exclusive_lock(Path(tempfile.gettempdir()) / "cotune-faults-page.lock"):
            newest = Page.read(file)
            newest.lines.update({key: self.lines[key] for key in self.new})
            file.write_text(newest.text(), encoding="utf-8")

    def text(self) -> str:
        return _INTRODUCTION + "\n".join(self.lines.values()) + "\n"
