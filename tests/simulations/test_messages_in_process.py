"""Messages that are not written, because they stay in the process of a simulation, give the same run as written ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.client import app as client
from cotune.client import egress_guard
from cotune.flower.inprocess_grid import InProcessGrid
from cotune.protocol.messages import stays_here
from cotune.server import app as server
from cotune.simulations.run import Run, simulate
from tests.support.simulations import NewPlan, final_model, same, tensors_of


class _Elsewhere(InProcessGrid):
    """No grid is one of these: the server takes its messages for such as leave the process."""


def without_times(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in run.summary["rounds"]]


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "scaffold", "local": {"momentum": 0.0}},  # sends tensors beside the state
        {"wire": "int8", "train": "lora", "strategy": "flexlora", "lora": {"rank": 2}, "model": {"pooling": "native"}},
        {"strategy": {"fusion": "fisher"}},  # statistics beside the delta
        {"wire_down": "int8", "train": "lora", "lora": {"rank": 2}, "model": {"pooling": "native"}},
    ],
    ids=["scaffold", "int8", "fisher", "down"],
)
def test_written_messages_give_the_same_run(
    toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    plan = toy_plan(rounds=2, simulation={"baselines": []}, **changes)
    held: list[bool] = []
    check = egress_guard.check_update

    def noted(content: Any, *given: Any) -> Any:
        held.append(stays_here(content))
        return check(content, *given)

    monkeypatch.setattr(client, "check_update", noted)
    stays = simulate(plan, tmp_path / "one", device="cpu")
    assert held
    assert all(held)
    held.clear()
    monkeypatch.setattr(server, "InProcessGrid", _Elsewhere)
    # the names of both folders are of one length: requests name the sites in them, and bytes are counted
    written = simulate(plan, tmp_path / "two", device="cpu")
    assert not any(held)
    assert same(final_model(stays.folder), final_model(written.folder))
    assert tensors_of(stays.folder) == tensors_of(written.folder)
    assert without_times(stays) == without_times(written)
