"""What leaves after a private selection: the best run's plan, model and test figures, and the ε that covers the choice.

released/results.json    the figures, written last: with it the release is complete
released/compare.html    the same as a page
released/plan.toml       the plan of the best run
released/model/          its model
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cotune.errors import RunError
from cotune.plan.load import dump_plan
from cotune.plan.plan import Plan
from cotune.reporting.measures import get_measures
from cotune.reporting.model_card import CARD, model_card
from cotune.reporting.pages import page_environment
from cotune.reporting.privacy_statement import selection_statement
from cotune.server.runs.results import to_json
from cotune.storage.files import atomic_write, sync

_SCHEMA = 1


@dataclass(frozen=True)
class Selected:
    """The output of a private selection: nothing in it comes from a run that was not chosen.

    Attributes:
        plan: Name of the plan.
        vary: Key -> the values that it takes in the plans to choose from.
        plans: How many these are.
        expected_runs: Mean of the number of runs, which itself stays secret.
        digest: SHA-256 over the plans, the records and the mean.
        settings: Key -> value of the chosen plan.
        seed: Of the plan.
        plan_id: Of the chosen plan.
        test: The chosen model on the test records.
        test_examples: How many these are.
        epsilon: ε of all that is released, the choice included, at `delta`, for every unit that trains.
        delta: The smallest of any organization in any plan.
        epsilon_one_run: ε at `delta` of one run of the costliest plan: what it would be without a choice.
        unit: Whom the promise is made to.
    """

    plan: str
    vary: Mapping[str, Sequence[str]]
    plans: int
    expected_runs: float
    digest: str
    settings: Mapping[str, str]
    seed: int
    plan_id: str
    test: Mapping[str, float]
    test_examples: int
    epsilon: float
    delta: float
    epsilon_one_run: float
    unit: str


def build_statement(found: Selected) -> list[str]:
    """Return the promise in words."""
    return selection_statement(
        found.epsilon, found.delta, found.epsilon_one_run, plans=found.plans, expected_runs=found.expected_runs, unit=found.unit
    )


def release(found: Selected, plan: Plan, model: Path, folder: Path) -> None:
    """Write what leaves into an empty or absent folder; complete once results.json is there.

    Args:
        found: The output.
        plan: The chosen plan, resolved.
        model: The folder of the chosen run's model.
        folder: Where to.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed before it was complete
    shutil.copytree(model, folder / "model", copy_function=_copy_durably)
    _write_card(found, plan, folder / "model" / CARD)
    atomic_write(folder / "plan.toml", dump_plan(plan).encode())
    atomic_write(folder / "compare.html", _page(found).encode(errors="replace"))
    table = {"schema": _SCHEMA, **asdict(found), "statement": build_statement(found)}
    atomic_write(folder / "results.json", to_json(table))


def read_released(folder: Path) -> Selected | None:
    """Return what a folder holds; None where nothing was released into it. Raises RunError for a damaged file."""
    file = folder / "results.json"
    try:
        table: dict[str, Any] = json.loads(file.read_bytes())
        del table["schema"], table["statement"]
        return Selected(**table)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"{file} is damaged: expected the results of a selection; choose another folder with --out", code="run.damaged_file"
        ) from None


def _write_card(found: Selected, plan: Plan, file: Path) -> None:
    """In place of the run's own, which says what one run costs, and not the choice."""
    test = {"this model": found.test}
    card = model_card(plan, privacy=build_statement(found), length=plan.model.max_length, test=test, examples=found.test_examples)
    atomic_write(file, card.encode())
    file.chmod(0o644)


def _copy_durably(source: str, target: str) -> None:
    shutil.copy(source, target)
    sync(target)


def _page(found: Selected) -> str:
    template = page_environment().get_template("selected.html.j2")
    return template.render(found=found, measures=get_measures(found.test), statement=build_statement(found))
