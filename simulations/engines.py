"""The engines that can play a run on one machine: in this process and its workers, or Flower's Simulation Runtime on Ray."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

from flwr.app import Context, RecordDict, UserConfig
from flwr.serverapp import Grid, ServerApp

from cotune.client.app import app as client_app
from cotune.errors import CotuneError, PlanError, RunError, nearest
from cotune.flower.inprocess_grid import InProcessGrid
from cotune.server.app import app as server_app
from cotune.server.rounds.registered_evaluator import register_evaluator
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.baselines import build_personal_evaluate
from cotune.simulations.workers.grid import WorkerGrid
from cotune.simulations.workers.pool import WorkerPool


def check_engine(engine: str) -> None:
    """Raises PlanError for an engine that is unknown or not installed."""
    if engine not in ENGINES:
        raise PlanError(f'unknown engine "{engine}"{nearest(engine, ENGINES)}', code="plan.unknown_engine")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise PlanError(
            'the engine "ray" is not installed: run `pip install "cotune[ray]"`, or leave --engine out',
            code="plan.missing_package",
        )


def run_on(engine: str, folder: RunFolder, pool: WorkerPool | None = None) -> None:
    """Plays the run's unfinished rounds; in process, workers may answer. Raises RunError when the run fails."""
    with register_evaluator(build_personal_evaluate(folder)):
        if pool is not None:
            server_app(WorkerGrid(pool, folder), _context(folder))
        else:
            ENGINES[engine](folder)


def _in_process(folder: RunFolder) -> None:
    server_app(InProcessGrid(client_app, len(folder.file.participants)), _context(folder))


def _context(folder: RunFolder) -> Context:
    return Context(
        run_id=1,
        node_id=1,
        node_config=UserConfig(),
        state=RecordDict(),
        run_config=UserConfig({"run": str(folder.path)}),
    )


def _ray(folder: RunFolder) -> None:
    """Flower's own simulation: every organization is a virtual node, its ClientApp runs in Ray's worker processes."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    failed: list[BaseException] = []
    wrapped = ServerApp()

    @wrapped.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            server_app(
                grid,
                Context(context.run_id, context.node_id, context.node_config, context.state, _context(folder).run_config),
            )
        except BaseException as error:  # Flower would wrap it, or only log it
            failed.append(error)
            raise

    _simulate(wrapped, folder)
    for error in failed:
        raise (
            error
            if isinstance(error, CotuneError)
            else RunError(f"the run failed: {type(error).__name__}: {error}", code="run.failed")
        )
    if not folder.finished:
        raise RunError(
            "the simulation engine ended before the last round: expected all rounds; see the log, then --resume",
            code="run.incomplete",
        )


def _simulate(app: ServerApp, folder: RunFolder) -> None:
    from flwr.simulation import run_simulation  # deprecated without a replacement that takes objects; Flower is pinned

    cpus = os.cpu_count() or 1
    people = len(folder.file.participants)
    resources: dict[str, Any] = {"num_cpus": max(1, cpus // people), "num_gpus": _gpu_share(folder)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("flwr").setLevel(logging.ERROR)
        try:
            run_simulation(
                app,
                client_app,
                num_supernodes=people,
                backend_config={"client_resources": resources, "init_args": {"num_cpus": cpus}},
            )
        except Exception as error:
            logging.getLogger(__name__).debug("the simulation raised %r", error)  # the server's own error is in `failed`


def _gpu_share(folder: RunFolder) -> float:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() and folder.file.device != "cpu" else 0
    return min(1.0, gpus / len(folder.file.participants))


ENGINES: dict[str, Callable[[RunFolder], None]] = {"in-process": _in_process, "ray": _ray}
