"""A run with state at its organizations, killed wherever it is, ends as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import finish, kill_when, written
from tests.support.simulations import NewPlan, final_model, same, tensors_of, told

Cotune = Callable[..., BaseProcess]


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_killed_between_state_and_update(toy_plan: NewPlan, cotune: Cotune, tmp_path: Path, strategy: str) -> None:
    local = {"learning_rate": 0.02, "momentum": 0.0, "steps": 12}
    stages = [{"mode": "head", "rounds": 2, "local": local}, {"mode": "full", "rounds": 2, "local": local}]
    plan = toy_plan(train=stages, strategy=strategy, local={"momentum": 0.0}, simulation={"baselines": []})
    file = written(plan, tmp_path)
    log = tmp_path / "cotune.log"
    whole = tmp_path / "whole"
    run = tmp_path / "other"
    finish(cotune("simulate", file, "--out", whole, "--device", "cpu"), log)

    rng = random.Random(8)
    moments: list[Callable[[], Any]] = [
        lambda: told(run, "update_received", round=1, organization="org-1"),
        lambda: list(run.glob("sites/org-1/kept/*/round-00003.safetensors")),  # kept, and perhaps not yet in the outbox
        lambda: told(run, "update_received", round=3, organization="org-2"),
        lambda: list(run.glob("sites/org-2/kept/*/round-00004.safetensors")),
    ]
    arguments: tuple[str | Path, ...] = ("simulate", file, "--out", run, "--device", "cpu")
    for moment in moments:
        process = cotune(*arguments)
        kill_when(process, lambda m=moment: bool(m()), rng.uniform(0, 0.01))  # type: ignore[misc]
        assert process.exitcode == -9
        arguments = ("simulate", "--resume", run)
    finish(cotune(*arguments), log)

    assert same(final_model(run), final_model(whole))
    assert tensors_of(run) == tensors_of(whole)
    for site in ("org-1", "org-2"):
        one, other = (sorted((folder / "sites" / site / "kept").glob("*/*")) for folder in (run, whole))
        assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
        assert len(one) == 3
