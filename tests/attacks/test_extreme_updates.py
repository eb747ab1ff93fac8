"""A member sends a change so large that no organization takes the model after it.

On commit 8ecafb82, over real processes: one update of 3e38 in every entry was admitted, as nothing bounds what SGD sends without
privacy. The model reached 7.5e37, its accuracy had not fallen, every honest node refused it from then on, and the run went on to
its end with the attacker alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cotune.cli.progress import remote_line
from cotune.protocol.messages import Request
from cotune.server.app import train_rounds
from cotune.server.runs.events import read_events
from cotune.server.runs.run_folder import RunFolder
from cotune.strategies import Update
from cotune.strategies.types import MAX_VALUE, find_extreme
from tests.support.organizations import federation, model_of, update
from tests.support.run_folders import NewRun

NAMES = ("north", "south", "west")


def answering(value: float, round: int = 0) -> Callable[[Request], Update]:
    """It changes every entry by so much, in one round or in all."""

    def answer(request: Request) -> Update:
        changed = value if round in (0, request.round) else 0.001
        return update(request, {name: torch.full_like(tensor, changed) for name, tensor in request.state.items()})

    return answer


def new_folder(new_run: NewRun, rounds: int) -> RunFolder:
    return new_run(*NAMES, rounds=rounds, strategy="fedavg", local={"optimizer": "sgd", "learning_rate": 1.0, "steps": 1})


@pytest.mark.parametrize("value", [3e38, -3e38, 3e4])
def test_a_change_beyond_any_model_is_quarantined_and_the_others_go_on(new_run: NewRun, value: float) -> None:
    folder = new_folder(new_run, rounds=2)
    answers = {"north": answering(0.001), "south": answering(value), "west": answering(0.001)}
    progress = train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), lambda state: None)
    assert [entry["quarantined"] for entry in progress.history] == [["south"]] * 2
    assert [entry["participants"] for entry in progress.history] == [["north", "west"]] * 2
    assert find_extreme(progress.state, 1.0) is None


def test_a_state_that_no_organization_takes_is_not_applied(new_run: NewRun) -> None:
    """Each change alone could be one between two states that are taken."""
    folder = new_folder(new_run, rounds=3)
    answers = {name: answering(1.5 * MAX_VALUE, round=2) for name in NAMES}
    progress = train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), lambda state: None)
    assert [entry["applied"] for entry in progress.history] == [True, False, True]
    assert find_extreme(progress.state) is None
    [event] = [event for event in read_events(folder.path / "events.jsonl") if event["event"] == "round_not_applied"]
    assert "organizations take at most 10000" in (remote_line("round_not_applied", event) or "")


@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan")])
def test_what_is_extreme_is_found(value: float) -> None:
    found = find_extreme({"empty": torch.zeros(0), "usual": torch.ones(3), "head": torch.tensor([0.0, -value])})
    assert found is not None
    assert found[0] == "head"
