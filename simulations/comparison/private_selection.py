"""Private selection: of a secret number of runs, each of a plan drawn by chance, only the best is released.

Papernot & Steinke, "Hyperparameter Tuning with Renyi Differential Privacy", ICLR 2022, https://arxiv.org/abs/2110.03620; the
arithmetic is in `cotune.privacy.accounting.private_selection`. Its premises, and how they hold here:

- The number of runs is drawn secretly, once: `private/draws.json` is durable before the first run begins, so that anyone who
kills
  the process cannot draw again, and it is shown to nobody.
- Runs are independent and alike: each draws its plan uniformly, and its noise from the operating system.
- The score is computed from what the run releases and from public records: the test figure of its model, on records that test
  in every run and train in none.
- Nothing of the others leaves: the runs are in `private/`, for the owner of the folder alone, which is removed at the end.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cotune.errors import RunError
from cotune.observers import Observer
from cotune.privacy.accounting.private_selection import draw_repetitions
from cotune.privacy.mechanisms.random_generators import private_generator
from cotune.reporting.comparison_statistics import Variation
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.measures import measures_of
from cotune.server.runs.events import read_events
from cotune.server.runs.run_folder import lock_folder
from cotune.simulations.comparison.candidates import Candidates
from cotune.simulations.comparison.grid import build_grid, get_baseline
from cotune.simulations.comparison.private_selection_release import Selected, read_released, release
from cotune.simulations.comparison.workers import (
    Task,
    WorkerSlots,
    build_task,
    import_all,
    make_folder,
    read_run_summary,
    run_all,
)
from cotune.storage.json_documents import JsonDocument


def select(
    source: str | Path,
    variations: Sequence[Variation],
    *,
    expected_runs: float,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    jobs: int | None = None,
    device: str = "auto",
    imports: Sequence[str] = (),
    listener: Observer = lambda event, fields: None,
) -> tuple[Selected, Path]:
    """Play what is not finished yet of the runs that were drawn, and release the best one.

    Args:
        source: As of `load_plan`.
        variations: Keys and their values; every combination is a plan to choose from, under the plan's own seed.
        expected_runs: Mean of the number of runs, 1 or more.
        overrides: As of `load_plan`.
        out: Folder of the selection; None: selected/<plan>.
        jobs: Processes beside each other; None: as many as cores and memory allow, one on a GPU.
        device: auto, cpu, cuda or cuda:N.
        imports: Modules that a worker imports first.
        listener: Hears which plans are checked and that the runs begin, and nothing of single runs.

    Returns:
        What was released, and the folder with it; of a selection that was finished before, the same again.

    Raises:
        PlanError: For plans among which nothing can be chosen privately.
        PrivacyError: For a mean below 1.
        RunError: Where a run was cut off from outside, so that the same call goes on; where no run ended with a model; or for a
            folder that holds something else.
    """
    import_all(imports)
    get_baseline(variations, None)
    candidates = Candidates.of(build_grid(source, variations, 1, overrides, device, listener), expected_runs)
    folder = (out or Path("selected") / candidates.cells[0].plan.name).expanduser().resolve()
    make_folder(folder)
    with lock_folder(folder):
        _check_folder(folder)
        found = read_released(folder / "released")
        if found is None:
            found = _Selection(folder, candidates, tuple(variations)).play(jobs, device, imports, listener)
        _check_same(found.digest, candidates, folder)
        shutil.rmtree(folder / "private", ignore_errors=True)
    return found, folder / "released"


@dataclass(frozen=True)
class _Selection:
    folder: Path
    candidates: Candidates
    variations: tuple[Variation, ...]

    @property
    def private(self) -> Path:
        return self.folder / "private"

    def play(self, jobs: int | None, device: str, imports: Sequence[str], listener: Observer) -> Selected:
        self.private.mkdir(mode=0o700, exist_ok=True)
        draws = _draws(self.private, self.candidates, self.folder)
        about = {"plans": len(self.candidates.cells), "epsilon": self.candidates.epsilon_selected()}
        listener("selection_started", {"folder": str(self.folder), "delta": self.candidates.delta, **about})
        tasks = [
            build_task(self.candidates.cells[drawn], f"run {i}", self.private / "runs" / f"{i:05d}", device)
            for i, drawn in enumerate(draws)
        ]
        _play(tasks, jobs, device, imports)
        return self._release(draws, [task.folder for task in tasks])

    def _release(self, draws: Sequence[int], runs: Sequence[Path]) -> Selected:
        """Release the run with the best score: of equals the first, which is any of them, as they were drawn alike."""
        scores = {i: _score(read_run_summary(run)) for i, run in enumerate(runs) if _has_model(run)}
        if not scores:
            raise RunError(
                "no run ended with a model, so that nothing is released: expected plans that train; the reasons, which must not"
                f" leave, are in {self.private}",
                code="run.nothing_selected",
            )
        best = max(scores, key=lambda i: scores[i])
        cell = self.candidates.cells[draws[best]]
        test = read_run_summary(runs[best]).test
        found = Selected(
            plan=cell.plan.name,
            vary={variation.key: list(variation.values) for variation in self.variations},
            plans=len(self.candidates.cells),
            expected_runs=self.candidates.expected_runs,
            digest=self.candidates.digest,
            settings=dict(cell.settings),
            seed=cell.plan.seed,
            plan_id=cell.plan_id,
            test=dict(test.federated or {}),
            test_examples=test.examples,
            epsilon=self.candidates.epsilon_selected(runs),
            delta=self.candidates.delta,
            epsilon_one_run=self.candidates.epsilon_one_run,
            unit=self.candidates.unit,
        )
        try:
            release(found, cell.plan, runs[best] / "model", self.folder / "released")
        except OSError as error:
            raise RunError(
                f"{self.folder / 'released'} cannot be written ({error}): free space for it; the same command goes on",
                code="run.not_writable",
            ) from None
        return found


def _check_folder(folder: Path) -> None:
    if (folder / "cells").exists():
        raise RunError(
            f"{folder} holds a comparison, which shows the figures of all runs: choose another folder with --out",
            code="run.folder_exists",
        )


def _check_same(digest: str, candidates: Candidates, folder: Path) -> None:
    if digest != candidates.digest:
        raise RunError(
            f"{folder} holds a selection among other plans or records, or with another number of runs: expected the same ones;"
            " another selection belongs into a folder of its own (--out), and its ε comes on top",
            code="run.other_selection",
        )


class _Draws(BaseModel):
    """draws.json: among which candidates, and which plan each run has."""

    digest: str
    draws: list[int]


def _draws(private: Path, candidates: Candidates, folder: Path) -> list[int]:
    """Return the plan of each run, by its number: drawn when this is called for the first time, and durable since then."""
    advice = "it must not be drawn again: choose another folder with --out"
    document = JsonDocument(private / "draws.json", _Draws, advice=advice)
    drawn = document.read()
    if drawn is None:
        generator = private_generator()
        count = draw_repetitions(candidates.expected_runs, generator)
        numbers = generator.integers(len(candidates.cells), size=count).tolist()
        drawn = _Draws(digest=candidates.digest, draws=numbers)
        document.write(drawn)
    _check_same(drawn.digest, candidates, folder)
    return drawn.draws


def _play(tasks: Sequence[Task], jobs: int | None, device: str, imports: Sequence[str]) -> None:
    """Play all runs that are not over. Raises RunError for one that was cut off from outside."""
    todo = [task for task in tasks if not _is_over(task.folder)]
    room = WorkerSlots.here(len(todo), jobs, device)
    for task, reason in run_all(todo, room, imports, _nobody):
        if _has_model(task.folder):
            room.saw(read_run_summary(task.folder).peak_memory_bytes or 0)
        elif not _has_failed(task.folder):
            raise RunError(
                f"a run was cut off ({reason}): correct that; nothing is released until the same command has gone on",
                code="run.cut_off",
            )


def _nobody(event: str, fields: dict[str, Any]) -> None:
    """Hears what runs do: what a terminal shows would leave."""


def _score(summary: RunSummary) -> float:
    """Of the federated model, on the common test set: more is better."""
    measured = summary.test.federated
    measure = measures_of(summary)[0]
    return -math.inf if measured is None else measure.rank(measured[measure.key])


def _is_over(run: Path) -> bool:
    return _has_model(run) or _has_failed(run)


def _has_model(run: Path) -> bool:
    return (run / "summary.json").exists()


def _has_failed(run: Path) -> bool:
    """Whether the run ended by its own rules, as a round had too few good updates: a result, which is not tried again.

    A failure from outside (a full disk, a killed worker) is none: the run goes on when the command is given again.
    """
    file = run / "events.jsonl"
    events = read_events(file) if file.exists() else []
    last = [event["event"] for event in events[-1:]] == ["run_failed"]
    begun = max((i for i, event in enumerate(events) if event["event"] == "round_started"), default=0)
    return last and any(event["event"] in ("update_dropped", "update_quarantined") for event in events[begun:])
