"""Reading a plan: a preset or a TOML file, with overrides; every mistake is one sentence that names the nearest known key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from cotune.models.errors import PlanError
from cotune.models.table import first_mistake
from cotune.plan.document import folder_of, preset_names, preset_text, read_document, value_of
from cotune.plan.schema import Plan
from cotune.strategies.compatibility import first_problem
from cotune.strategies.own_names import check_own_names
from cotune.strategies.plugins import pinned
from cotune.strategies.recipes import expand

__all__ = ["dump_plan", "load_plan", "parse_plan", "preset_names", "preset_text", "value_of"]


def load_plan(source: str | Path = "tweets", overrides: Sequence[str] = (), *, own_code: bool = True) -> Plan:
    """The plan in a TOML file or a preset, with `key=value` overrides such as "privacy.epsilon=3". Raises PlanError.

    own_code: whether a strategy's part that is code (`fusion = "my_rules.py:my_fusion"`, relative to the plan) may be run to
    learn what it needs; without, such a plan must have been completed by whoever made it.
    """
    table = read_document(source, overrides)
    if not own_code:
        return parse_plan(table)
    return _with_own_parts(table, folder_of(source))


def parse_plan(table: Mapping[str, Any]) -> Plan:
    """A plan from plain values. Raises PlanError with one sentence for the first mistake."""
    try:
        return Plan.model_validate(dict(table))
    except ValidationError as error:
        raise PlanError(first_mistake(error, Plan, "plan")) from None


def _with_own_parts(table: dict[str, Any], folder: Path) -> Plan:
    """The plan, with what must be said about parts that are code: their content, parameters, and what they want sent."""
    try:
        check_own_names(table.get("strategy"), folder)
        table = expand(table)
        table["strategy"], infos = pinned(table.get("strategy", {}), folder)
    except ValueError as error:
        raise PlanError(f"the plan is not valid: strategy: {error}") from None
    plan = parse_plan(table)
    problem = first_problem(plan.strategy, plan.facts, infos)
    if problem:
        raise PlanError(f"the plan is not valid: {problem}")
    return plan


def dump_plan(plan: Plan) -> str:
    """The plan as TOML: `parse_plan(tomllib.loads(dump_plan(plan))) == plan`."""
    return tomli_w.dumps(_without_none(plan.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
