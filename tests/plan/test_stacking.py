"""Plans of stacking: what they cannot have, and what they say of their members."""

from __future__ import annotations

from typing import Any

import pytest

from cotune.errors import PlanError
from cotune.models.config import MemberConfig
from cotune.plan.load import parse_plan
from cotune.plan.stacking import explain_stacking, list_uncovered

NORTH = {"name": "north", "epsilon": 3.0, "delta": 1e-5}
SOUTH = {"name": "south", "handed_over": True}


def plan_of(**changes: Any) -> Any:
    model = {"base": "together", "members": [NORTH, SOUTH], **changes.pop("model", {})}
    return parse_plan({"name": "stacked", "model": model, "data": {"source": "records.csv"}, **changes})


def test_plan_of_stacking_is_read() -> None:
    members = plan_of().model.members
    assert [member.name for member in members] == ["north", "south"]
    assert plan_of().plan_id != plan_of(model={"members": [NORTH, {**NORTH, "name": "south"}]}).plan_id


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "lora"},
        {"train": "full"},
        {"train": [{"mode": "head", "rounds": 1}, {"mode": "full", "rounds": 1}]},
        {"task": "token-classification"},
        {"task": "image-classification"},
        {"collaboration": "predictions", "public": {"source": "public.csv"}},
        {"model": {"feature": {"layers": [1]}}},
        {"model": {"pooling": "mean"}},
        {"model": {"members": [NORTH, NORTH]}},
        {"model": {"members": [{"name": "north"}]}},
        {"model": {"members": [{"name": "north", "epsilon": 3.0}]}},
        {"model": {"members": [{"name": "north", "delta": 1e-5}]}},
        {"model": {"members": [{**NORTH, "handed_over": True}]}},
        {"model": {"members": [{**NORTH, "epsilon": float("inf")}]}},
        {"model": {"members": [{**NORTH, "epsilon": 0.0}]}},
        {"model": {"members": [{**NORTH, "name": "\x1b[2J"}]}},
        {"model": {"members": [{**NORTH, "other": 1}]}},
    ],
)
def test_plan_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(**changes)
    assert caught.value.code == "plan.invalid"


def test_explanation_names_what_has_no_privacy() -> None:
    members = [MemberConfig.model_validate(table) for table in (NORTH, SOUTH)]
    said = explain_stacking(members, private=True)
    assert "north's (ε = 3 at δ = 1e-05)" in said
    assert "south's (NO privacy" in said
    assert "under the plan's ε" in said
    assert "NO noise" in explain_stacking(members[:1], private=False)
    assert (len(list_uncovered(members)), list_uncovered([])) == (1, ())
