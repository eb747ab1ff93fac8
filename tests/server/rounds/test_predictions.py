"""Rounds in which a member's predictions are not what the plan agrees on: the others' are fused, and it is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cotune.ensembles.public_inputs import PublicPredictions, pin_public, read_public_inputs
from cotune.plan.public import SCORES
from cotune.protocol.messages import Request
from cotune.server.app import train_rounds
from cotune.server.runs.run_folder import RunFolder
from cotune.strategies.types import Update
from tests.support.datasets import sentences, write_csv
from tests.support.organizations import Answer, federation, model_of, update
from tests.support.rounds import IMPATIENT
from tests.support.run_folders import NewRun

INPUTS = 10
NAMES = ("org-1", "org-2", "org-3")


@pytest.fixture
def folder(new_run: NewRun, tmp_path: Path) -> RunFolder:
    file = write_csv(tmp_path / "public.csv", sentences(INPUTS, seed=5))
    plan = new_run(
        *NAMES, collaboration="predictions", public={"source": str(file)}, strategy={"weighting": "uniform"}, rounds=1
    ).plan
    pinned = pin_public(plan, Path()).public.model_dump()
    return new_run(
        *NAMES, collaboration="predictions", public=pinned, strategy={"weighting": "uniform"}, rounds=1, server={"strikes": 1}
    )


def saying(scores: Mapping[str, Tensor]) -> Answer:
    return lambda request: update(request, scores)


def honest(request: Request) -> Update:
    """It prefers the first class."""
    return update(request, {SCORES: torch.tensor([[2.0, -1.0, -1.0]]).repeat(INPUTS, 1) - request.state[SCORES]})


LIES: dict[str, Mapping[str, Tensor]] = {
    "of another public set": {SCORES: torch.zeros(INPUTS + 1, 3)},
    "of other classes": {SCORES: torch.zeros(INPUTS, 2)},
    "without numbers": {SCORES: torch.full((INPUTS, 3), torch.nan)},
    "without end": {SCORES: torch.full((INPUTS, 3), torch.inf)},
    "beyond the bounds": {SCORES: torch.full((INPUTS, 3), 25.0)},
    "with parameters": {SCORES: torch.zeros(INPUTS, 3), "classifier.weight": torch.zeros(3, 16)},
    "nothing": {},
}


@pytest.mark.parametrize("lie", LIES)
def test_lie_is_refused_and_the_others_are_fused(folder: RunFolder, lie: str) -> None:
    plan = folder.plan
    answers = {"org-1": honest, "org-2": honest, "org-3": saying(LIES[lie])}
    model = model_of(plan)
    public = PublicPredictions(model, read_public_inputs(plan, Path()), "float32", plan.seed)
    grid = federation(plan, answers)
    progress = train_rounds(grid, folder, model, lambda state: None, public=public, limits=IMPATIENT)
    [entry] = progress.history
    assert entry.participants == ["org-1", "org-2"]
    assert entry.quarantined == ["org-3"]
    assert progress.state[SCORES] == pytest.approx(torch.tensor([[2.0, -1.0, -1.0]]).repeat(INPUTS, 1))
