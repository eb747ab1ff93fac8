from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.plan.load import load_plan
from cotune.plan.plan import Plan
from cotune.server.deployment.new_run import create_run
from cotune.server.deployment.plan_for_members import with_robust_default
from cotune.server.runs.events import read_events
from tests.support.failures import fails_with
from tests.support.federations import founded
from tests.support.unreliable_grid import LINES

BaseModel = Callable[[str], Path]


def test_a_plan_that_names_nothing_gets_it(tmp_path: Path, base_model: BaseModel) -> None:
    plan = founded(tmp_path / "fed", base_model("bert"), "a", "b").invitation.plan
    assert (plan.strategy.weighting.name, plan.strategy.fusion.name) == ("examples", "robust")


def test_preset_with_server_optimizer_gets_the_robust_fusion() -> None:
    plan = load_plan("tweets", ["strategy.server_optimizer.momentum=0.5"])
    changed = with_robust_default(plan)
    assert changed.strategy.fusion.name == "robust"
    assert changed.strategy.server_optimizer == plan.strategy.server_optimizer


@pytest.mark.parametrize("override", ["strategy=fedavg", "strategy=scaffold", "strategy.fusion=mean", "strategy=rfa"])
def test_what_a_plan_names_stays(override: str) -> None:
    changes = [override, *(["local.momentum=0.0"] if "scaffold" in override else [])]
    plan = load_plan("text", changes)
    assert with_robust_default(plan) is plan


@pytest.mark.parametrize(
    "override", ["client_privacy={epsilon = 8.0}", "server.late=fold", "server.visibility=sum"], ids=["client", "late", "sum"]
)
def test_a_plan_that_cannot_have_it_keeps_the_mean(override: str) -> None:
    extra = ["strategy.weighting=uniform"] if "client" in override else []
    plan: Plan = load_plan("text", [override, *extra])
    assert with_robust_default(plan) is plan


def test_counts_that_are_agreed_on_with_some_alone_start_no_run(tmp_path: Path, base_model: BaseModel) -> None:
    federation = founded(tmp_path / "fed", base_model("bert"), "a", "b")
    federation.members.invite("a", LINES[0], (10, 20))
    with fails_with("run.mixed_record_counts"):
        create_run(federation)
    federation.members.invite("b", LINES[1], (10, 20))
    assert not [note for note in notes(create_run(federation)) if "agreed" in note]


def test_run_notes_counts_not_agreed_on_and_few_organizations(tmp_path: Path, base_model: BaseModel) -> None:
    said = notes(create_run(founded(tmp_path / "few", base_model("bert"), "a", "b")))
    assert len(said) == 2
    four = founded(tmp_path / "four", base_model("bert"), "a", "b", "c", "d")
    assert len(notes(create_run(four))) == 1


def notes(run: Any) -> list[str]:
    return (
        [event["text"] for event in read_events(run.events.path) if event["event"] == "note"] if run.events.path.exists() else []
    )
