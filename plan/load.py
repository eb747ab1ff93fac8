"""Read a plan from a preset or a TOML file, with overrides. Every mistake is one sentence that names the nearest known key.

Nothing here imports torch, so that a missing plan or file is reported at once.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from cotune.errors import PlanError, nearest
from cotune.plan.plan import Plan
from cotune.plan.tables import PlanTables
from cotune.storage.config_table import check_path, format_validation_error
from cotune.storage.json_documents import parse_toml
from cotune.strategies.compatibility import find_problem
from cotune.strategies.config import COMPLETE, expand
from cotune.strategies.own_rule_hints import check_own_names
from cotune.strategies.plugins import pin_code


def preset_names() -> list[str]:
    """Return the names of the plans that ship with cotune."""
    folder = resources.files("cotune.plan") / "presets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def preset_summary(name: str) -> str:
    """Return the purpose of a preset, the first sentence of its comment; raises PlanError for an unknown name."""
    lines = preset_text(name).splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(lambda each: each.startswith("#"), lines))
    return re.split(r"[.:] ", comment, maxsplit=1)[0].rstrip(".")


def preset_text(name: str) -> str:
    """Return a preset as TOML with its comments; raises PlanError for an unknown name."""
    if name not in preset_names():
        raise PlanError(
            f'there is neither a preset nor a file "{name}"{nearest(name, preset_names())}', code="plan.unknown_preset"
        )
    return (resources.files("cotune.plan") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read_document(source: str | Path = "tweets", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the tables of a TOML file or a preset with overrides applied.

    Args:
        source: A file ending in .toml, or the name of a preset.
        overrides: KEY=VALUE, such as "privacy.epsilon=3".

    Raises:
        PlanError: If the source cannot be read, or an override is malformed.
    """
    table = parse_plan_text(read_text(source), source)
    table.setdefault("name", Path(source).stem if _is_file(source) else str(source))
    for override in overrides:
        _override(table, override)
    return table


def read_text(source: str | Path) -> str:
    """Return the text of a TOML file or a preset. Raises PlanError if it cannot be read."""
    return _read(Path(source)) if _is_file(source) else preset_text(str(source))


def parse_plan_text(text: str, source: str | Path) -> dict[str, Any]:
    """Return the tables in the text of a plan, which came from a source. Raises PlanError if it is not TOML."""
    try:
        return parse_toml(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(
            f"{source} is not valid TOML ({error}): expected a plan as `cotune plan new tweets` prints it",
            code="plan.malformed_toml",
        ) from None


def _is_file(source: str | Path) -> bool:
    return Path(source).suffix == ".toml" or Path(source).exists()


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return tables with only the keys that the overrides set; raises PlanError if one is malformed."""
    table: dict[str, Any] = {}
    for override in overrides:
        _override(table, override)
    return table


def get_plan_folder(source: str | Path) -> Path:
    """Return the folder that paths of a plan's own code are relative to."""
    path = Path(source)
    return path.parent if path.suffix == ".toml" else Path()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with the byte order mark of editors on Windows
    except FileNotFoundError:
        raise PlanError(
            f"the plan {path} does not exist: expected a TOML file; `cotune plan new tweets > my.toml` makes one",
            code="plan.missing_file",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"the plan {path} cannot be read ({error}): expected a TOML file in UTF-8", code="plan.not_readable"
        ) from None


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise PlanError(
            f'the override "{text}" is not understood: expected key=value, such as privacy.epsilon=3',
            code="plan.malformed_override",
        )
    here: Any = table
    for part in path[:-1]:
        if isinstance(here, list):
            here = _item(here, part, text)
            continue
        here[part] = _long_form(path[0], part, here.get(part))
        here = here[part]
    if isinstance(here, list):
        _item(here, path[-1], text)
        here[int(path[-1])] = parse_value(value)
    else:
        here[path[-1]] = parse_value(value)


def _long_form(table: str, part: str, value: Any) -> Any:
    """Return what a key is set in: the table that a short form stands for, so that the rest of it stays."""
    if table == "strategy" and isinstance(value, str):
        return {"recipe" if part == "strategy" else "name": value}
    if table == part == "personal" and isinstance(value, str | list):
        return {"method" if isinstance(value, str) else "parts": value}
    return value if isinstance(value, dict | list) else {}


def _item(items: list[Any], part: str, text: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise PlanError(
            f'the override "{text}" is not understood: expected a number from 0 to {len(items) - 1} for {part}',
            code="plan.malformed_override",
        )
    return items[int(part)]


def parse_value(text: str) -> Any:
    """Parse a text as a TOML value; if that fails, return the text itself."""
    try:
        return parse_toml(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def load_plan(source: str | Path = "tweets", overrides: Sequence[str] = (), *, own_code: bool = True) -> Plan:
    """Return the plan in a TOML file or a preset.

    Args:
        source: A file ending in .toml, or the name of a preset.
        overrides: KEY=VALUE, such as "privacy.epsilon=3".
        own_code: Whether components in files (`fusion = "my_rules.py:my_fusion"`, relative to the plan) may be executed to find
            out what they need. If not, such a plan must have been completed by its author.

    Raises:
        PlanError: If the plan is not valid.
    """
    table = read_document(source, overrides)
    check_tables(table)
    if not own_code:
        return parse_plan(table)
    return _with_own_parts(table, get_plan_folder(source))


def check_tables(table: Mapping[str, Any], *, partial: bool = False) -> None:
    """Check each table of a plan but its strategy, which does not need PyTorch. Conditions between tables are not checked.

    Args:
        table: The plan's keys and values.
        partial: Whether keys may be missing, as in overrides.

    Raises:
        PlanError: With the sentence that `parse_plan` would give.
    """
    try:
        PlanTables.model_validate(dict(table))
    except ValidationError as error:
        sentence = format_validation_error(error, Plan, "plan", partial=partial)
        if sentence:
            raise PlanError(sentence, code="plan.invalid") from None


def check_key(key: str) -> None:
    """Raise PlanError unless plans have a key of that full name; parameters of strategy components are not checked."""
    check_path(key, Plan, "plan", anything_below=("strategy", "class_weights"))


def parse_plan(table: Mapping[str, Any], *, complete: bool = False) -> Plan:
    """Build a plan from plain values.

    Args:
        table: The plan's keys and values.
        complete: Whether `dump_plan` wrote it. Its strategy is then not validated again, so that the components' modules, which
            load PyTorch, are not imported.

    Raises:
        PlanError: With one sentence about the first mistake.
    """
    try:
        return Plan.model_validate(dict(table), context=COMPLETE if complete else None)
    except ValidationError as error:
        raise PlanError(format_validation_error(error, Plan, "plan"), code="plan.invalid") from None


def _with_own_parts(table: dict[str, Any], folder: Path) -> Plan:
    """Return the plan with its components in files completed: their hashes, parameters, and what they ask to be sent."""
    try:
        check_own_names(table.get("strategy"), folder)
        table = expand(table)
        table["strategy"], infos = pin_code(table.get("strategy", {}), folder)
    except ValueError as error:
        raise PlanError(f"the plan is not valid: strategy: {error}", code="plan.strategy") from None
    plan = parse_plan(table)
    problem = find_problem(plan.strategy, plan.facts, infos)
    if problem:
        raise PlanError(f"the plan is not valid: {problem}", code="plan.strategy")
    return plan


def dump_plan(plan: Plan) -> str:
    """Return the plan as TOML, such that `parse_plan(tomllib.loads(dump_plan(plan))) == plan`."""
    return tomli_w.dumps(_without_none(plan.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
