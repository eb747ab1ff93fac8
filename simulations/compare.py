"""A fair comparison: every combination of variations of a plan, under the same seeds, played once and kept.

A combination under a seed is a *cell*: an ordinary run in a folder that is named for its plan's id, so that cells that are there
already are read and not played again, whoever asked for them. The id holds the plan and the base model's hash but not the records:
a cell counts only while the fingerprint of the records in its run.json is that of today's.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cotune.models.device import pick_device
from cotune.models.durable import write_durably
from cotune.models.errors import CotuneError, PlanError, RunError, nearest
from cotune.plan.load import load_plan
from cotune.plan.schema import Plan
from cotune.server.run_folder import RunFile, keep_others_off
from cotune.simulations.comparison import Combination, Measured, Settings, combine
from cotune.simulations.sites import prepare
from cotune.simulations.summary import dumps
from cotune.simulations.workers import Listener, Task, import_all, play_beside, play_here

__all__ = ["Comparison", "Variation", "compare", "parse_variation"]

_SHORT = {  # as the options of `cotune simulate`
    "data": "data.source",
    "text": "data.text",
    "label": "data.label",
    "model": "model.base",
    "clients": "simulation.clients",
    "partition": "simulation.partition",
}
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Variation:
    """A key of the plan and the values that it takes, as in an override."""

    key: str
    values: tuple[str, ...]

    @property
    def path(self) -> str:
        """The key in the plan, of which `key` may be a short name."""
        return _SHORT.get(self.key, self.key)


@dataclass(frozen=True)
class Cell:
    """A combination under a seed, checked. plan: resolved. data: fingerprint of the records."""

    settings: Settings
    plan: Plan
    plan_id: str
    data: str

    @property
    def name(self) -> str:
        return f"{_words(self.settings)}, seed={self.plan.seed}"


@dataclass(frozen=True)
class Comparison:
    """What came out: cells in the order of the grid, and their rows. `cells[i].folder` is relative to `folder`."""

    folder: Path
    plan: str
    variations: tuple[Variation, ...]
    baseline: str
    seeds: tuple[int, ...]
    private: bool
    cells: tuple[Measured, ...]
    rows: tuple[Combination, ...]

    @property
    def failed(self) -> tuple[Measured, ...]:
        return tuple(cell for cell in self.cells if cell.status == "failed")


def parse_variation(text: str) -> Variation:
    """ "KEY=V1,V2", split at commas outside of brackets and quotes. Raises PlanError.

    >>> parse_variation('strategy.fusion=mean,{name="ties",density=0.3}').values
    ('mean', '{name="ties",density=0.3}')
    """
    key, _, rest = text.partition("=")
    values = tuple(value.strip() for value in _split(rest))
    if not key.strip() or not all(values):
        raise PlanError(f'the variation "{text}" is not understood: expected KEY=V1,V2, such as partition=iid,dirichlet:0.1')
    if len(set(values)) < len(values):
        raise PlanError(f'the variation "{text}" has a value twice: expected distinct ones')
    return Variation(key.strip(), values)


def _split(text: str) -> Iterator[str]:
    start, closing, quote = 0, list[str](), ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _CLOSING:
            closing.append(_CLOSING[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == "," and not closing:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def compare(
    source: str | Path,
    variations: Sequence[Variation],
    *,
    seeds: int = 5,
    baseline: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    jobs: int | None = None,
    device: str = "auto",
    imports: Sequence[str] = (),
    listener: Listener = lambda event, fields: None,
) -> Comparison:
    """Plays what is not finished yet of every combination under `seeds` seeds, from the plan's own on, and writes the results.

    source, overrides: as of `load_plan`. baseline: a value of the first variation; None: its first. out: None: compare/<plan>.
    jobs: processes beside each other; None: as many as cores and memory allow, one on a GPU; 1: this process. imports: modules (by name, or
    by path) that a worker imports first, such as one that registers an architecture. A cell that fails while it runs is a result
    like any other; a combination that cannot be had is refused before any runs, by PlanError. Raises RunError when another
    process works on the folder.
    """
    import_all(imports)
    chosen = _baseline(variations, baseline)
    cells = _cells(source, variations, seeds, overrides, device)
    folder = (out or Path("compare") / cells[0].plan.name).expanduser().resolve()
    _make(folder)
    with keep_others_off(folder):
        places = {cell.name: _place(folder, cell) for cell in cells}
        todo = [cell for cell in cells if not _finished(places[cell.name], cell)]
        listener("comparison_started", {"folder": str(folder), "cells": len(cells), "finished": len(cells) - len(todo)})
        reasons = _play(todo, places, [places[c.name] for c in cells if c not in todo], jobs, device, imports, listener)
        measured = [_measure(cell, folder, places[cell.name], reasons.get(cell.name, "")) for cell in cells]
        found = Comparison(
            folder,
            cells[0].plan.name,
            tuple(variations),
            chosen,
            tuple(sorted({cell.plan.seed for cell in cells})),
            any(cell.plan.privacy != "none" for cell in cells),
            tuple(measured),
            combine(measured, chosen),
        )
        _write(found)
    return found


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder {folder} cannot be written ({error.strerror}): choose another with --out") from None


def _baseline(variations: Sequence[Variation], baseline: str | None) -> str:
    """The value that others are compared with. Raises PlanError for variations that make no grid."""
    if not variations:
        raise PlanError("there is nothing to compare: expected at least one --vary, such as --vary strategy.weighting=examples,uniform")
    paths = [variation.path for variation in variations]
    if len(set(paths)) < len(paths) or "seed" in paths:
        raise PlanError(f"the keys {', '.join(paths)} cannot be varied together: expected distinct ones, and --seeds for the seed")
    first = variations[0]
    if baseline is not None and baseline not in first.values:
        raise PlanError(f'the baseline "{baseline}" is no value of {first.key}{nearest(baseline, first.values)}')
    return first.values[0] if baseline is None else baseline


def _cells(
    source: str | Path, variations: Sequence[Variation], seeds: int, overrides: Sequence[str], device: str
) -> list[Cell]:
    """All cells in the order of the grid, seeds last. Raises PlanError, which names the combination that cannot be had."""
    if not 1 <= seeds <= _MOST_SEEDS:
        raise PlanError(f"expected 1 to {_MOST_SEEDS} seeds, got {seeds}")
    keys = [variation.key for variation in variations]
    grid = [tuple(zip(keys, values, strict=True)) for values in itertools.product(*(each.values for each in variations))]
    paths = {variation.key: variation.path for variation in variations}
    first = _plan(source, grid[0], paths, overrides).seed
    found = {
        (settings, seed): _checked(settings, _plan(source, settings, paths, [*overrides, f"seed={seed}"]), device)
        for seed in range(first, first + seeds)  # outermost: one seed has one initial model, which is loaded once
        for settings in grid
    }
    cells = [found[settings, seed] for settings in grid for seed in range(first, first + seeds)]
    _check_distinct(cells)
    return cells


def _plan(source: str | Path, settings: Settings, paths: Mapping[str, str], overrides: Sequence[str]) -> Plan:
    """The plan of a combination; without baselines, which cost much and compare nothing here, unless it asks for them."""
    given = [*overrides, *(f"{paths[key]}={value}" for key, value in settings)]
    try:
        plan = load_plan(source, given)
        asked = "baselines" in plan.simulation.model_fields_set
        return plan if asked else load_plan(source, [*given, "simulation.baselines=[]"])
    except PlanError as error:
        raise PlanError(f"{_words(settings)}: {error}") from None


def _checked(settings: Settings, plan: Plan, device: str) -> Cell:
    try:
        prepared = prepare(plan, device)
    except CotuneError as error:
        raise PlanError(f"{_words(settings)}, seed={plan.seed}: {error}") from None
    return Cell(settings, prepared.plan, prepared.plan.plan_id, prepared.fingerprint)


def _check_distinct(cells: Sequence[Cell]) -> None:
    seen: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        other = seen.setdefault((cell.plan_id, cell.data), cell)
        if other is not cell:
            raise PlanError(f"{other.name} and {cell.name} are the same plan: expected values that differ")


def _words(settings: Settings) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings)


def _place(folder: Path, cell: Cell) -> Path:
    """The folder of a cell's run: named for its plan, and for its records too where that one holds a run on others."""
    path = folder / "cells" / cell.plan_id[:16]
    file = path / "run.json"
    if file.exists() and RunFile.model_validate_json(file.read_bytes()).data != cell.data:
        path = path.with_name(f"{path.name}-{cell.data[:8]}")
    return path


def _finished(path: Path, cell: Cell) -> bool:
    try:
        return bool(json.loads((path / "summary.json").read_bytes())["plan_id"] == cell.plan_id)
    except (OSError, ValueError, KeyError):
        return False


def _play(
    todo: Sequence[Cell],
    places: Mapping[str, Path],
    finished: Sequence[Path],
    jobs: int | None,
    device: str,
    imports: Sequence[str],
    listener: Listener,
) -> dict[str, str]:
    """Plays the cells, in this process or in several; returns why those that failed did."""
    for cell in todo:
        if not (places[cell.name] / "run.json").exists():  # killed before it was the folder of a run
            shutil.rmtree(places[cell.name], ignore_errors=True)
    tasks = [Task(cell.name, cell.plan.canonical(), places[cell.name], device) for cell in todo]
    room, reasons = _Room(len(tasks), jobs, device), {}
    for path in finished:
        room.saw(path)
    alone = room.most == 1
    for task, reason in _here(tasks, listener) if alone else play_beside(tasks, imports, room.jobs, room.threads, listener):
        if reason:
            reasons[task.name] = reason
            listener("cell_failed", {"cell": task.name, "reason": reason})
        else:
            room.saw(task.folder)
            listener("cell_finished", {"cell": task.name, **_told(task.folder)})
    return reasons


def _here(tasks: Sequence[Task], listener: Listener) -> Iterator[tuple[Task, str]]:
    for task in tasks:
        listener("cell_started", {"cell": task.name})
        yield task, play_here(task, listener)


def _told(path: Path) -> dict[str, Any]:
    summary = json.loads((path / "summary.json").read_bytes())
    return {"accuracy": summary["test"]["federated"]["accuracy"], "seconds": summary["seconds"]}


class _Room:
    """How many processes fit: as many as were asked for, else as cores and memory allow, by what finished cells have needed."""

    def __init__(self, tasks: int, wanted: int | None, device: str) -> None:
        on_gpu = pick_device(device).type == "cuda"
        self.wanted, self.cores = wanted, _cores()
        self.most = max(1, min(tasks, wanted or (1 if on_gpu else self.cores)))
        self.memory, self.needed = available_memory(), 0

    def saw(self, path: Path) -> None:
        """A finished cell."""
        self.needed = max(self.needed, json.loads((path / "summary.json").read_bytes())["peak_memory_bytes"])

    def jobs(self) -> int:
        if self.wanted is not None:
            return self.most
        return max(1, min(self.most, self.memory // self.needed)) if self.needed else 1  # the first shows what a cell needs

    def threads(self) -> int:
        return max(1, self.cores // self.most)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that new processes can have without swapping; all of the machine's where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _measure(cell: Cell, folder: Path, path: Path, reason: str) -> Measured:
    """A cell's result from its summary.json. Raises RunError where that is gone."""
    common = {"settings": cell.settings, "seed": cell.plan.seed, "plan_id": cell.plan_id, "folder": str(path.relative_to(folder))}
    if reason:
        return Measured(**common, status="failed", reason=reason)
    try:
        summary = json.loads((path / "summary.json").read_bytes())
    except (OSError, ValueError):
        raise RunError(f"{path / 'summary.json'} cannot be read: expected the results of a finished run; remove the folder") from None
    own = [each["own"]["accuracy"] for each in summary["organisations"] if each["own"]]
    spent = [each["epsilon_spent"] for each in summary["organisations"] if each["epsilon_spent"] is not None]
    return Measured(
        **common,
        **summary["test"]["federated"],
        status=summary["status"],
        reason=summary["stopped"] or "",
        worst=min(own, default=None),
        spread=statistics.pstdev(own) if own else None,
        bytes_up=summary["bytes"]["up"],
        bytes_down=summary["bytes"]["down"],
        seconds=summary["seconds"],
        epsilon=max(spent, default=None),
        curve=tuple((entry["round"], entry["metrics"]["accuracy"]) for entry in summary["rounds"] if entry["metrics"]),
    )


_COLUMNS = (
    *("accuracy", "precision", "recall", "f1", "worst", "spread", "bytes_up", "bytes_down", "seconds", "epsilon"),
    *("status", "reason"),
)


def _write(found: Comparison) -> None:
    """results.csv, results.json and compare.html."""
    from cotune.simulations.comparison_report import write_comparison

    write_durably(found.folder / "results.csv", _csv(found).encode())
    write_durably(found.folder / "results.json", dumps(_as_dict(found)))
    write_comparison(found, found.folder / "compare.html")


def _csv(found: Comparison) -> str:
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow([*(variation.key for variation in found.variations), "seed", "plan_id", *_COLUMNS])
    for cell in found.cells:
        values = (getattr(cell, column) for column in _COLUMNS)
        settings = (value for _, value in cell.settings)
        table.writerow([*settings, cell.seed, cell.plan_id, *("" if value is None else value for value in values)])
    return stream.getvalue()


def _as_dict(found: Comparison) -> dict[str, Any]:
    rows = []
    for row in found.rows:
        table = {key: value for key, value in asdict(row).items() if key != "cells"}
        rows.append({**table, "facet": dict(row.facet), "seeds": [cell.seed for cell in row.cells if cell.status != "failed"]})
    return {
        "schema": 1,
        "plan": found.plan,
        "vary": {variation.key: list(variation.values) for variation in found.variations},
        "baseline": found.baseline,
        "seeds": list(found.seeds),
        "rows": rows,
        "cells": [{**asdict(cell), "settings": dict(cell.settings)} for cell in found.cells],
    }
