"""Reading a plan: a preset or a TOML file, with overrides; every mistake is one sentence that names the nearest known key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from cotune.models.errors import PlanError
from cotune.models.table import check_path, first_mistake
from cotune.plan.document import folder_of, read_document
from cotune.plan.schema import Plan
from cotune.plan.tables import PlanTables
from cotune.strategies.compatibility import first_problem
from cotune.strategies.own_names import check_own_names
from cotune.strategies.plugins import pinned
from cotune.strategies.recipes import expand


def load_plan(source: str | Path = "tweets", overrides: Sequence[str] = (), *, own_code: bool = True) -> Plan:
    """The plan in a TOML file or a preset, with `key=value` overrides such as "privacy.epsilon=3". Raises PlanError.

    own_code: whether a strategy's part that is code (`fusion = "my_rules.py:my_fusion"`, relative to the plan) may be run to
    learn what it needs; without, such a plan must have been completed by whoever made it.
    """
    table = read_document(source, overrides)
    check_tables(table)
    if not own_code:
        return parse_plan(table)
    return _with_own_parts(table, folder_of(source))


def check_tables(table: Mapping[str, Any], *, partial: bool = False) -> None:
    """Check all of a plan but its strategy, and what its tables must be together: what needs no import of PyTorch.

    Args:
        table: A plan from plain values.
        partial: Whether keys may be absent, as in overrides alone.

    Raises:
        PlanError: With the sentence that `parse_plan` would have.
    """
    try:
        PlanTables.model_validate(dict(table))
    except ValidationError as error:
        sentence = first_mistake(error, Plan, "plan", partial=partial)
        if sentence:
            raise PlanError(sentence) from None


def check_key(key: str) -> None:
    """Check that a plan has a key of that full name; the keys of parts of a strategy are not looked at. Raises PlanError."""
    check_path(key, Plan, "plan", anything_below=("strategy", "class_weights"))


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
