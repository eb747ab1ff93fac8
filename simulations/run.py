"""The main job: a simulated federation from a plan to a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cotune.errors import RunError
from cotune.models.export import export_model
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.model_card import CARD
from cotune.reporting.run_report import write_report
from cotune.server.runs.results import build_model_card, to_json
from cotune.server.runs.run_folder import RunFolder, check_run_folder, pick_run_folder
from cotune.server.runs.run_model import final_params
from cotune.simulations.baselines import (
    export_each,
    export_own_models,
    run_baselines,
)
from cotune.simulations.engines import check_engine, run_on
from cotune.simulations.fitted_heads import personalize
from cotune.simulations.garbage_collection import rare_garbage_collection
from cotune.simulations.prepare import Prepared, make_run, prepare
from cotune.simulations.summary import summarize
from cotune.simulations.workers.grid import check_workers, open_workers, share_threads
from cotune.simulations.workers.pool import Peak, WorkerPool
from cotune.storage.files import atomic_write


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its summary (see docs/run-folder.md)."""

    folder: Path
    summary: RunSummary


Notes = Callable[[Sequence[str]], None]  # what is to be known of the records, for anyone who would stop and correct them


def simulate(
    plan: Plan,
    out: Path | None = None,
    *,
    engine: str = "in-process",
    device: str = "auto",
    workers: int = 1,
    noted: Notes = lambda notes: None,
) -> Run:
    """Run a plan with simulated organizations: train, compare, report.

    Args:
        plan: The plan.
        out: The folder of the run; None: runs/<time>-<plan>.
        engine: "in-process" or "ray".
        device: auto, cpu, cuda or cuda:N.
        workers: How many processes train, with the engine "in-process". 1: this one does, and no other is started. With more,
            all of them, and this one, compute with an equal share of its threads; the result is that of one process with the
            same number of threads. They import the main module: a script needs `if __name__ == "__main__":`.
        noted: Called with the notes about the records before anything is trained; they are in the summary, too.

    Raises:
        CotuneError: With what is wrong; what was finished before is kept in the folder, for `resume`.
    """
    began = time.monotonic()
    check_engine(engine)
    check_workers(workers, engine)
    with share_threads(workers):
        prepared = prepare(plan, device)
        noted(prepared.notes)
        folder = start(prepared, out, engine, device)
        with folder.locked(), rare_garbage_collection(), open_workers(folder, workers) as pool:
            run_on(engine, folder, pool)
            return complete(folder, prepared, time.monotonic() - began, pool)


def start(prepared: Prepared, out: Path | None, engine: str, device: str) -> RunFolder:
    """Makes the folder of a new run. Raises RunError when the folder is not empty or cannot be written."""
    path = check_run_folder(out or pick_run_folder(prepared.plan.name))
    try:
        return make_run(prepared, path, engine, device)
    except OSError as error:
        raise RunError(
            f"the folder {path} cannot be written ({error.strerror}): choose another with --out", code="run.not_writable"
        ) from None


def resume(path: Path, *, workers: int = 1) -> Run:
    """Continues a run after its last finished round, with any number of workers. A finished run is reported again."""
    began = time.monotonic()
    folder = RunFolder(path.expanduser().resolve())
    engine = folder.file.engine if folder.file.engine != "flower" else "ray"  # started by `flwr run`
    check_workers(workers, engine)
    with folder.locked(), rare_garbage_collection(), share_threads(workers):
        prepared = prepare(folder.plan, folder.file.device)
        if (prepared.plan.plan_id, prepared.fingerprint) != (folder.plan.plan_id, folder.file.data):
            raise RunError(
                f"the data or the model of {path} are not what they were: expected those that plan.toml describes",
                code="run.changed_inputs",
            )
        before = sum(float(entry.seconds) for entry in folder.load().history)  # rounds that earlier processes finished
        with open_workers(folder, workers) as pool:
            if not folder.finished:
                check_engine(engine)
                run_on(engine, folder, pool)
            return complete(folder, prepared, before + time.monotonic() - began, pool)


def complete(folder: RunFolder, prepared: Prepared, seconds: float, pool: WorkerPool | None = None) -> Run:
    """After the last round: baselines, which workers may train, the exported model, summary.json and report.html."""
    began = time.monotonic()
    results = run_baselines(folder, prepared, pool)
    beside = Peak()
    if pool is not None:
        beside = pool.peak
        pool.close()  # the rest has their memory
    personalized = personalize(folder, prepared, final_params(folder.plan, folder.load()))
    summary = summarize(folder, prepared, results, personalized, seconds + time.monotonic() - began, beside)
    _export(folder, summary)
    atomic_write(folder.path / "summary.json", to_json(summary))
    write_report(summary, folder.path / "report.html")
    return Run(folder.path, summary)


def _export(folder: RunFolder, summary: RunSummary) -> None:
    """The model of the run, where there is a common one; each organization's in its site, where it has one of its own."""
    state = final_params(folder.plan, folder.load())
    if folder.plan.keeps_personal:
        export_each(folder, state)
    if folder.plan.shares_predictions:
        export_own_models(folder)
    if folder.plan.keeps_parts:
        return
    model = get_plan_model(folder.plan, folder.file.device)
    model.load(state)
    export_model(model, folder.path / "model", {CARD: build_model_card(folder.plan, summary, model.loaded.text_length)})
