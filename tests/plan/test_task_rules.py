"""What a plan's task allows: the facts are those of the task's code, and each rule says what to do."""

from __future__ import annotations

from typing import get_args

import pytest

from cotune.data.config import TASK_FACTS, TaskName
from cotune.data.multi_task import is_multi_task
from cotune.data.tasks.task import get_task
from cotune.plan.load import parse_plan
from cotune.plan.task_rules import find_task_problems


@pytest.mark.parametrize("task", get_args(TaskName))
def test_facts_about_a_task_are_those_of_its_code(task: TaskName) -> None:
    facts = TASK_FACTS[task]
    does = get_task(task)
    assert facts.keeps_head == does.keeps_head
    assert facts.several == does.has_several_heads == is_multi_task(task)
    assert facts.classes <= facts.labels


def test_every_task_has_facts() -> None:
    assert set(TASK_FACTS) == set(get_args(TaskName))


def test_problems_of_several_kinds_are_all_found() -> None:
    plan = parse_plan({"model": {"base": "b"}, "data": {"source": "r.csv"}})
    wrong = plan.model_copy(update={"task": "regression", "labels": ("a", "b")})
    found = list(find_task_problems(wrong, plan.stages, keeps_personal=False))
    assert [problem.split(" ")[0] for problem in found] == ["labels", "task"]
