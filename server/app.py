"""The Flower ServerApp: it runs the rounds of a run folder over any grid, and delivers the model of a real run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cotune.data.dataset import DatasetManifest
from cotune.data.metrics.metrics import Metrics
from cotune.ensembles.public_inputs import PublicPredictions, read_public_inputs
from cotune.errors import CotuneError
from cotune.flower.control_client import find_run_folder
from cotune.flower.inprocess_grid import InProcessGrid
from cotune.flower.runtime_client import open_runtime_client
from cotune.models.evaluation.test_set import evaluate
from cotune.models.trainable import State, TrainableModel
from cotune.printable import clean_output
from cotune.reporting.documents.events import RunFailed
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.front_refusals import RefusalWatch
from cotune.server.deployment.layout import FederationFiles
from cotune.server.deployment.members import Members
from cotune.server.deployment.signed_trail import SignedTrail
from cotune.server.rounds.loop import Evaluate, run_rounds
from cotune.server.rounds.model_delivery import deliver
from cotune.server.rounds.registered_evaluator import get_registered_evaluator
from cotune.server.rounds.run_environment import NoTrail, RunEnvironment
from cotune.server.rounds.strategy_step import Score
from cotune.server.runs.events import observe_run, read_events
from cotune.server.runs.results import finalize_run
from cotune.server.runs.run_folder import Progress, RunFolder, manifest_file
from cotune.server.runs.run_model import load_run_model
from cotune.server.time_limits import TIME_LIMITS, TimeLimits
from cotune.server.transport.base import InProcessTransport
from cotune.server.transport.node_registry import RegisteredNodes, Roster, SimulatedNodes
from cotune.server.transport.superlink import SuperLinkTransport

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the unfinished rounds of the folder that the run configuration names as `run`.

    The model of a real run, which no other process may train meanwhile, is delivered too, and its report is written.

    Raises:
        RunError: The run cannot go on.
    """
    folder = RunFolder(find_run_folder(str(context.run_config.get("run") or "")))
    if not folder.file.federation:
        return train(grid, folder)  # anyone who simulates holds the folder's lock
    clean_output()
    watch = RefusalWatch(FederationFiles(Path(folder.file.federation)).superlink.refusals, folder.events)
    with folder.locked(), _failures_reported(folder), observe_run(watch):
        if not folder.finished:
            train(grid, folder)
        deliver_model(grid, folder)
        finalize_run(folder)


@contextmanager
def _failures_reported(folder: RunFolder) -> Iterator[None]:
    """Report whatever ends this process, which nobody watches, as an event, unless the rounds have done so."""
    try:
        yield
    except CotuneError as error:
        _report_failure(folder, str(error))
        raise
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        _report_failure(folder, f"the run cannot go on ({words}): correct that, and continue it with --resume")
        raise


def _report_failure(folder: RunFolder, reason: str) -> None:
    last = read_events(folder.events.path)[-1:] if folder.events.path.exists() else []
    if not last or (last[0].event, last[0].get("reason")) != ("run_failed", reason):
        folder.events.write(RunFailed(round=min(folder.last_round + 1, folder.plan.rounds), reason=reason))


def train(grid: Grid, folder: RunFolder) -> None:
    """Train the unfinished rounds, evaluated on the test set of the folder (baselines and real runs may have none)."""
    plan = folder.plan
    model = load_run_model(folder)
    document = manifest_file(folder.path, "test")
    test = DatasetManifest.read(document, plan.labels) if document.exists() else None

    def evaluate_test(state: State) -> Metrics | None:
        return None if test is None else evaluate(model, state, test, plan.model.precision, plan.physical_rows)

    held = manifest_file(folder.path, "validation")
    validation = DatasetManifest.read(held, plan.labels) if held.exists() else None

    def score(state: State) -> float:
        assert validation is not None, "asked only where there are records"
        return evaluate(model, state, validation, plan.model.precision, plan.physical_rows).score

    common = None if plan.keeps_parts else evaluate_test
    evaluator = get_registered_evaluator(common) if plan.keeps_personal else evaluate_test
    train_rounds(grid, folder, model, evaluator, score if validation else None, _open_public(folder, model))


def _open_public(folder: RunFolder, model: TrainableModel) -> PublicPredictions | None:
    """The plan's public inputs, where a model learns from them. Raises DataError where they are gone or are others."""
    plan = folder.plan
    if not plan.shares_predictions and not plan.strategy.fusion.info("fusion").needs.public_inputs:
        return None
    inputs = read_public_inputs(plan, Path(folder.file.federation or "."))
    return PublicPredictions(model, inputs, plan.model.precision, plan.seed)


def train_rounds(
    grid: Grid,
    folder: RunFolder,
    model: TrainableModel,
    evaluate: Evaluate,
    score: Score | None = None,
    public: PublicPredictions | None = None,
    limits: TimeLimits = TIME_LIMITS,
) -> Progress:
    """Train the unfinished rounds of a run over a grid.

    Args:
        grid: Connection to the nodes.
        folder: Of the run.
        model: Of the run's plan.
        evaluate: See `rounds.loop.run_rounds`, as for `score` and `public`.
        score: State -> accuracy on validation records.
        public: The plan's public inputs.
        limits: Intervals and timeouts.
    """
    return run_rounds(open_session(grid, folder, limits), model, evaluate, score, public)


def deliver_model(grid: Grid, folder: RunFolder, limits: TimeLimits = TIME_LIMITS) -> list[str]:
    """Deliver the final model of a real run over a grid (see `rounds.model_delivery.deliver`).

    Args:
        grid: Connection to the nodes.
        folder: Of the run.
        limits: Intervals and timeouts.
    """
    return deliver(open_session(grid, folder, limits))


def open_session(grid: Grid, folder: RunFolder, limits: TimeLimits = TIME_LIMITS) -> RunEnvironment:
    """Create the environment of a run: in-process nodes for a simulation; SuperLink, members and signatures for a real run.

    Args:
        grid: Connection to the nodes.
        folder: Of the run.
        limits: Intervals and timeouts.
    """
    names = [participant.name for participant in folder.file.participants]
    if not folder.file.federation:
        return RunEnvironment(
            folder,
            open_transport=lambda: InProcessTransport(grid, SimulatedNodes(grid, names)),
            read_members=lambda: dict.fromkeys(names),
            trail=NoTrail(),
            limits=limits,
            in_process=isinstance(grid, InProcessGrid),
        )
    members = FederationFolder(Path(folder.file.federation)).members
    return RunEnvironment(
        folder,
        open_transport=lambda: _open_superlink(grid, folder, members, limits),
        read_members=lambda: {member.name: member.examples for member in members.active()},
        trail=SignedTrail(folder),
        limits=limits,
    )


def _open_superlink(grid: Grid, folder: RunFolder, members: Members, limits: TimeLimits) -> SuperLinkTransport:
    line = open_runtime_client(grid)
    return SuperLinkTransport(line, RegisteredNodes(line, lambda: _read_roster(members)), folder.events.write, limits)


def _read_roster(members: Members) -> Roster:
    found = members.all()
    names = {member.key: member.name for member in found if member.revoked is None}
    return Roster(names, frozenset(member.name for member in found) - set(names.values()))
