"""Where results go: tables that are written after each measurement, and what ends a section."""

from __future__ import annotations

import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

Row = dict[str, Any]


@dataclass
class Section:
    """What a section found: rows of one table, or why there are none."""

    name: str
    rows: list[Row] = field(default_factory=list)
    skipped: str | None = None
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    Attributes:
        device: That is measured.
        tiny: Whether models are tiny and steps few.
        folder: Of the results.
        until: No measurement begins after this time (`time.monotonic`).
        sections: What was found so far.
    """

    device: torch.device
    tiny: bool
    folder: Path
    until: float
    sections: list[Section] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def work(self, name: str) -> Path:
        """A new folder for what a section needs beside its results."""
        return Path(tempfile.mkdtemp(prefix=f"cotune-{name}-"))

    def add(self, **row: Any) -> None:
        """Add a row to the present section, and write it."""
        self.sections[-1].rows.append(row)
        print("  " + ", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self.write()

    def attempt(self, measure: Callable[[], Row], **row: Any) -> None:
        """Add what `measure` finds to a row; a failure is found, too. Nothing is begun when the time is over."""
        if time.monotonic() > self.until:
            self.add(**row, failed="the time was over")
            return
        began = time.monotonic()
        try:
            found = measure()
        except Exception as error:
            traceback.print_exc()
            found = {"failed": reason_of_failure(error)}
        free(self.device)
        self.add(**row, **found, seconds=round(time.monotonic() - began, 1))

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        here = machine(self.device)
        found = {"machine": here, "tiny": self.tiny, "sections": [vars(section) for section in self.sections]}
        (self.folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (self.folder / "gpu.md").write_text(_page(here, self.sections), encoding="utf-8")


class Skipped(Exception):
    """A section has nothing to measure here, for the reason that it gives."""


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason_of_failure(error: BaseException) -> str:
    said = (str(error).strip() or "without a word").splitlines()[0][:200]
    return f"{type(error).__name__}: {said}"


def _page(machine: str, sections: list[Section]) -> str:
    lines = [machine, ""]
    for section in sections:
        lines += [f"## {section.name} ({section.seconds:.0f} s)", ""]
        lines += [text for text in (section.skipped, section.error) if text]
        keys = list(dict.fromkeys(key for row in section.rows for key in row))
        if keys:
            lines += [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
            lines += ["| " + " | ".join(_shown(row.get(key)).replace("|", "/") for key in keys) + " |" for row in section.rows]
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
