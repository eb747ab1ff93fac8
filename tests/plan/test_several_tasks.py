"""Which tasks can share an encoder, and how much the loss of each counts."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from cotune.data.config import TASK_FACTS, TaskName
from cotune.errors import PlanError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.several_tasks import WHY_NOT, TaskConfig

TASKS = [{"name": "mood", "labels": ["bad", "good"], "weight": 0.5}, {"name": "topic", "labels": [str(i) for i in range(8)]}]


def plan_of(**changes: Any) -> Plan:
    return parse_plan({"model": {"base": "b"}, "data": {"source": "r.csv"}, "train": "lora", "tasks": TASKS, **changes})


def test_weights_are_those_of_the_plan() -> None:
    assert plan_of().weights_of_classes() == (0.5, 0.5, *[1.0] * 8)


def test_weight_grows_with_the_norm_of_the_noise_in_a_head() -> None:
    """√2 and √8 are 2/3 and 4/3 of their mean."""
    found = plan_of(balance="noise_to_signal").weights_of_classes()
    assert found == pytest.approx((0.5 * 2 / 3,) * 2 + (4 / 3,) * 8)


def test_balance_is_for_several_tasks() -> None:
    with pytest.raises(PlanError, match="balance") as refused:
        parse_plan({"model": {"base": "b"}, "data": {"source": "r.csv"}, "balance": "noise_to_signal"})
    assert refused.value.code == "plan.invalid"


def test_each_task_can_be_one_of_several_or_is_explained() -> None:
    single = {task for task in get_args(TaskName) if not TASK_FACTS[task].several}
    assert single == set(get_args(TaskConfig.model_fields["type"].annotation)) | set(WHY_NOT)


@pytest.mark.parametrize("type", WHY_NOT)
def test_a_type_that_cannot_be_shared_is_refused(type: str) -> None:
    with pytest.raises(PlanError, match=WHY_NOT[type]) as refused:
        plan_of(tasks=[*TASKS, {"name": "other", "type": type}])
    assert refused.value.code == "plan.invalid"


def test_tags_follow_from_the_types_of_tasks() -> None:
    """The part of a plan without tags reads records of words as the whole does."""
    tagged = plan_of(tasks=[*TASKS, {"name": "names", "type": "token-classification"}])
    assert (tagged.task, tagged.data.tags) == ("multi-task-tags", ("names",))
    part = plan_of(data={"source": "r.csv", "tasks": tagged.data.tasks, "tags": ["names"]})
    assert part.task == "multi-task-tags"
    assert plan_of().task == "multi-task"
    assert plan_of().data.tags == ()
