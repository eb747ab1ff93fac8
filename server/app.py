"""The Flower ServerApp: runs the rounds of a run folder, whatever the grid."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cotune.models.errors import RunError
from cotune.models.holdings import HoldingsFile
from cotune.models.sharing import State
from cotune.models.tasks import Metrics
from cotune.plan.model import model_of
from cotune.server.evaluation import evaluate, present_judge
from cotune.server.rounds import run_rounds
from cotune.server.run_folder import RunFolder

__all__ = ["app", "main", "play"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Plays the unfinished rounds of the folder that the run configuration names as `run`. Raises RunError."""
    path = str(context.run_config.get("run") or "")
    if not path:
        raise RunError('the run configuration has no "run": expected the folder of a run')
    play(grid, RunFolder(Path(path)))


def play(grid: Grid, folder: RunFolder) -> None:
    """Runs the rounds, with the test set that the folder holds as judge (baselines and real runs may have none)."""
    plan = folder.plan
    model = model_of(plan, folder.file.device)
    document = folder.path / "test" / "data.json"
    test = HoldingsFile.read(document, plan.labels) if document.exists() else None

    def judge(state: State) -> Metrics | None:
        return None if test is None else evaluate(model, state, test, plan.model.precision)

    held = folder.path / "validation" / "data.json"
    validation = HoldingsFile.read(held, plan.labels) if held.exists() else None

    def score(state: State) -> float:
        assert validation is not None, "asked only where there are records"
        return evaluate(model, state, validation, plan.model.precision).accuracy

    run_rounds(grid, folder, model, present_judge() if plan.keeps_personal else judge, score if validation else None)
