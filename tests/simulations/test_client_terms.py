"""A run with state at its organizations, killed wherever it is, ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from cotune.simulations.run import simulate
from tests.support.processes import Cotune, Moment, play_killed
from tests.support.simulations import NewPlan, final_model, same, tensors_of

FEW = (
    Moment("renamed", {"path": "*/sites/org-1/kept/*/round-00003.safetensors"}),  # kept, and not yet in the outbox
    Moment("update_received", {"round": 3, "organization": "org-2"}),
)
MANY = (
    Moment("update_received", {"round": 1, "organization": "org-1"}),
    *FEW,
    Moment("renamed", {"path": "*/sites/org-2/kept/*/round-00004.safetensors"}),
)


@pytest.mark.crash
@pytest.mark.parametrize(
    ("strategy", "moments"),
    [
        pytest.param("scaffold", FEW, id="scaffold, few"),
        pytest.param("scaffold", MANY, id="scaffold", marks=pytest.mark.long),
        pytest.param("feddyn", MANY, id="feddyn", marks=pytest.mark.long),
    ],
)
def test_killed_between_state_and_update(
    toy_plan: NewPlan, cotune: Cotune, tmp_path: Path, strategy: str, moments: Sequence[Moment]
) -> None:
    local = {"learning_rate": 0.02, "momentum": 0.0, "steps": 6}
    stages = [{"mode": "head", "rounds": 2, "local": local}, {"mode": "full", "rounds": 2, "local": local}]
    plan = toy_plan("shallow-bert", train=stages, strategy=strategy, local={"momentum": 0.0}, simulation={"baselines": []})
    whole = tmp_path / "whole"
    run = tmp_path / "other"
    simulate(plan, whole, device="cpu")
    play_killed(cotune, plan, run, moments)

    assert same(final_model(run), final_model(whole))
    assert tensors_of(run) == tensors_of(whole)
    for site in ("org-1", "org-2"):
        one, other = (sorted((folder / "sites" / site / "kept").glob("*/*")) for folder in (run, whole))
        assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
        assert len(one) == 3
