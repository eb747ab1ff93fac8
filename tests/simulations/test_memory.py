"""What rules remember goes through the checkpoints: a run that is cut off after every update ends as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.server.runs.events import observe_run
from cotune.simulations.run import resume, simulate
from tests.support.simulations import NewPlan, tensors_of

HEAD_THEN_ALL = [{"mode": "head", "rounds": 2}, {"mode": "full", "rounds": 1, "local": {"learning_rate": 0.02}}]
RUNS: dict[str, dict[str, Any]] = {
    "adam": {"strategy": "fedadam", "train": HEAD_THEN_ALL},
    "fedexp": {"strategy": "fedexp", "train": HEAD_THEN_ALL},
    "a center and a velocity": {
        "strategy": {"recipe": "centered_clipping", "server_optimizer": {"name": "sgd", "momentum": 0.5}},
        "train": HEAD_THEN_ALL,
    },
    "c and Adam's moments": {
        "strategy": {"recipe": "scaffold", "server_optimizer": "adam"},
        "local": {"momentum": 0.0},
        "train": HEAD_THEN_ALL,
    },
    "Flower's": {"strategy": "flwr.serverapp.strategy:FedAdam"},
    "parts of one's own": {"strategy": "fedsa", "train": "lora"},
}


class Aborted(Exception):
    """Ends the run in the middle of a round."""


@pytest.mark.parametrize("kind", RUNS)
def test_cut_off_after_every_update(toy_plan: NewPlan, tmp_path: Path, kind: str) -> None:
    tables = RUNS[kind]
    local = {"learning_rate": 0.5, "steps": 2, **tables.get("local", {})}
    plan = toy_plan("shallow-bert", **{**tables, "local": local, "simulation": {"baselines": []}})
    whole = tmp_path / "whole"
    run = tmp_path / "other"
    simulate(plan, whole, device="cpu")
    seen = set[tuple[Any, ...]]()

    def cut(event: str, fields: dict[str, Any]) -> None:
        what = (event, fields.get("round"), fields.get("organization"))
        if event in ("update_received", "round_finished") and what not in seen:
            seen.add(what)
            raise Aborted

    while True:
        try:
            with observe_run(cut):
                resume(run) if (run / "run.json").exists() else simulate(plan, run, device="cpu")
            break
        except Aborted:
            pass
    assert len(seen) == 9  # two updates and the end, of three rounds
    assert tensors_of(run) == tensors_of(whole)
    models = [sorted((folder / "sites").glob("*/model/model.safetensors")) for folder in (run, whole)]
    assert [file.read_bytes() for file in models[0]] == [file.read_bytes() for file in models[1]]
    assert bool(models[0]) == (kind == "parts of one's own")
