"""Commands that need a task whose records have classes."""

from __future__ import annotations

from cotune.data.config import has_classes
from cotune.errors import PlanError
from cotune.plan.plan import Plan


def require_classes(plan: Plan, command: str) -> None:
    """Refuse a plan of a task without classes, for a command that cannot evaluate texts.

    Raises:
        PlanError: If the plan's task has no classes.
    """
    if not has_classes(plan.task):
        raise PlanError(
            f"{command} is for answers that are one class each, and those of task = {plan.task} are none: expected another task;"
            " `cotune simulate` plays this one",
            code="plan.no_classes",
        )
