"""A fair comparison: every combination of variations of a plan, under the same seeds, played once and kept."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cotune.errors import RunError
from cotune.observers import Observer
from cotune.reporting.comparison_report import write_comparison
from cotune.reporting.comparison_statistics import Comparison, Measured, Variation, combine, deciding_measure
from cotune.reporting.measures import get_measures, headline
from cotune.server.runs.results import to_json
from cotune.server.runs.run_folder import lock_folder
from cotune.simulations.comparison.grid import (
    GridPoint,
    build_grid,
    get_baseline,
    get_run_path,
    is_finished,
    parse_variation,
    read_measured,
)
from cotune.simulations.comparison.workers import WorkerSlots, build_task, import_all, make_folder, read_run_summary, run_all
from cotune.simulations.joint_privacy_loss import compose_epsilon, get_steps_by_organization
from cotune.storage.files import atomic_write


def compare(
    source: str | Path,
    variations: Sequence[Variation | str],
    *,
    seeds: int = 5,
    baseline: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    jobs: int | None = None,
    device: str = "auto",
    imports: Sequence[str] = (),
    listener: Observer = lambda event, fields: None,
) -> Comparison:
    """Play what is not finished yet of every combination under `seeds` seeds, from the plan's own on, and write the results.

    Args:
        source: A preset or a TOML file, as of `load_plan`.
        variations: What differs, also as on the command line: "local.steps=5,20".
        seeds: How many, each combination under the same ones.
        baseline: A value of the first variation, which the others are compared with; None: its first.
        overrides: As of `load_plan`.
        out: The folder of the results; None: compare/<plan>.
        jobs: Processes beside each other; None: as many as cores and memory allow, one on a GPU; 1: this process.
        device: auto, cpu, cuda or cuda:N.
        imports: Modules (by name, or by path) that a worker imports first, such as one that registers an architecture.
        listener: Called with every event.

    Returns:
        The figures. A cell that fails while it runs is a result like any other.

    Raises:
        PlanError: For a combination that is not supported, before any runs.
        RunError: When another process works on the folder, or it holds a private selection.
    """
    import_all(imports)
    varied = [parse_variation(each) if isinstance(each, str) else each for each in variations]
    chosen = get_baseline(varied, baseline)
    cells = build_grid(source, varied, seeds, overrides, device, listener)
    folder = (out or Path("compare") / cells[0].plan.name).expanduser().resolve()
    make_folder(folder)
    with lock_folder(folder):
        _check_no_selection(folder)
        places = {cell.name: get_run_path(folder, cell) for cell in cells}
        todo = [cell for cell in cells if not is_finished(places[cell.name], cell)]
        notes = collect_notes(cells)
        counts = {"cells": len(cells), "finished": len(cells) - len(todo)}
        listener("comparison_started", {"folder": str(folder), **counts, "notes": notes})
        reasons = _play(todo, places, [places[c.name] for c in cells if c not in todo], jobs, device, imports, listener)
        measured = [read_measured(cell, folder, places[cell.name], reasons.get(cell.name, "")) for cell in cells]
        epsilon, delta = _together(cells, places, measured)
        found = Comparison(
            folder=folder,
            plan=cells[0].plan.name,
            variations=tuple(varied),
            baseline=chosen,
            seeds=tuple(sorted({cell.plan.seed for cell in cells})),
            private=any(cell.plan.privacy != "none" for cell in cells),
            cells=tuple(measured),
            rows=combine(measured, chosen),
            measure=deciding_measure(measured),
            epsilon_together=epsilon,
            delta_together=delta,
            notes=notes,
        )
        _write(found)
    return found


def collect_notes(cells: Sequence[GridPoint]) -> tuple[str, ...]:
    """Return the notes about the records of all cells, each once; of one that only some cells have, in how many."""
    counts = Counter(note for cell in cells for note in dict.fromkeys(cell.notes))
    return tuple(note if count == len(cells) else f"{note} (in {count} of {len(cells)} runs)" for note, count in counts.items())


def _together(
    cells: Sequence[GridPoint], places: Mapping[str, Path], measured: Sequence[Measured]
) -> tuple[float, float] | tuple[None, None]:
    """ε of all runs, failed ones too, and the smallest δ of any; None where a run had no privacy.

    None too where models were trained beside it for comparison: the data pooled, and alone, are trained without privacy.
    """
    deltas = [delta for cell in measured for delta in cell.deltas]
    if not deltas or any(cell.plan.privacy == "none" or cell.plan.simulation.baselines for cell in cells):
        return None, None
    return compose_epsilon([get_steps_by_organization(places[cell.name]) for cell in cells], min(deltas)), min(deltas)


def _check_no_selection(folder: Path) -> None:
    if (folder / "private").exists() or (folder / "released").exists():
        raise RunError(
            f"{folder} holds a private selection, beside which the figures of all runs must not stand: choose another folder with"
            " --out",
            code="run.folder_exists",
        )


def _play(
    todo: Sequence[GridPoint],
    places: Mapping[str, Path],
    finished: Sequence[Path],
    jobs: int | None,
    device: str,
    imports: Sequence[str],
    listener: Observer,
) -> dict[str, str]:
    """Plays the cells, in this process or in several; returns why those that failed did."""
    tasks = [build_task(cell, cell.name, places[cell.name], device) for cell in todo]
    room = WorkerSlots.here(len(tasks), jobs, device)
    reasons = {}
    for path in finished:
        room.saw(read_run_summary(path).peak_memory_bytes or 0)
    for task, reason in run_all(tasks, room, imports, listener):
        if reason:
            reasons[task.name] = reason
            listener("cell_failed", {"cell": task.name, "reason": reason})
        else:
            summary = read_run_summary(task.folder)
            room.saw(summary.peak_memory_bytes or 0)
            score = "figures: none" if summary.test.federated is None else headline(summary.test.federated)
            listener("cell_finished", {"cell": task.name, "score": score, "seconds": summary.seconds})
    return reasons


_COLUMNS = (
    *(
        "worst",
        "spread",
        "gain",
        "answers",
        "bytes_up",
        "bytes_down",
        "seconds",
        "epsilon",
    ),
    *("status", "reason"),
)


def _write(found: Comparison) -> None:
    """results.csv, results.json and compare.html."""
    atomic_write(found.folder / "results.csv", _csv(found).encode())
    atomic_write(found.folder / "results.json", to_json(_as_dict(found)))
    write_comparison(found, found.folder / "compare.html")


def _csv(found: Comparison) -> str:
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    keys = [measure.key for measure in get_measures(next((cell.metrics for cell in found.cells if cell.metrics), None))]
    table.writerow([*(variation.key for variation in found.variations), "seed", "plan_id", *keys, *_COLUMNS])
    for cell in found.cells:
        values = [*(cell.metrics.get(key) for key in keys), *(_plain(getattr(cell, column)) for column in _COLUMNS)]
        settings = (value for _, value in cell.settings)
        table.writerow([*settings, cell.seed, cell.plan_id, *("" if value is None else value for value in values)])
    return stream.getvalue()


def _plain(value: Any) -> Any:
    """Answers as "yes/no/too close", such as 2/1/0."""
    return "/".join(map(str, value)) if isinstance(value, tuple) else value


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
        "measure": {"key": found.measure.key, "unit": found.measure.apart, "less_is_better": found.measure.less_is_better},
        "seeds": list(found.seeds),
        "epsilon_together": found.epsilon_together,
        "delta_together": found.delta_together,
        "notes": list(found.notes),
        "rows": rows,
        "cells": [{**asdict(cell), "settings": dict(cell.settings)} for cell in found.cells],
    }
