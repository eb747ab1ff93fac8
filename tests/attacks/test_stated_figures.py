"""A member that states an ε of 1e308, and other figures that no run can have.

On commit a605cba it was admitted; from then on `run`, `--resume` and `status` ended with an OverflowError, for ever.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.cli.progress import _round_line, remote_line
from cotune.privacy.accounting.display_rounding import round_up, round_up_number
from cotune.reporting.formatting import duration, percent, scientific, signed, size
from cotune.reporting.run_report import render_report
from cotune.server.app import train_rounds
from cotune.server.runs.results import summarize, to_json
from tests.support.organizations import adding, federation, model_of, update
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import real, wild

PRIVACY = {"epsilon": 8.0, "delta": 1e-5}
NUMBERS = st.floats() | st.integers() | st.integers(min_value=10**308, max_value=10**400)


def stating(**figures: Any) -> Any:
    def answer(request: Any) -> Any:
        return update(request, {name: 0 * tensor for name, tensor in request.state.items()}, steps=20, **figures)

    return answer


@pytest.mark.parametrize(
    "figures",
    [
        {"epsilon": 1e308},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"epsilon": 8.02},
        {"disclosures": {"correct": 1e308}},
        {"disclosures": {"correct": -1e308}},
        {"disclosures": {"records": math.nan}},
        {"noise_variance": "all 1e308"},
        {"examples": 10**12},
        {"examples": -1},
        {"steps": 10**9},
    ],
)
def test_it_is_refused(new_run: NewRun, figures: dict[str, Any]) -> None:
    def hostile(request: Any) -> Any:
        noise = {"noise_variance": dict.fromkeys(request.state, 1e308)} if "noise_variance" in figures else {}
        changed = {"steps": 20, **figures, **noise}
        return update(request, {name: 0 * tensor for name, tensor in request.state.items()}, **changed)

    folder = new_run("org-1", "org-2", rounds=1, privacy=PRIVACY, disclosures={"local_metrics": True})
    grid = federation(folder.plan, {"org-1": stating(epsilon=8.0, disclosures={"correct": 3.0}), "org-2": hostile})
    [entry] = train_rounds(grid, folder, model_of(folder.plan), lambda state: None).history
    assert entry["participants"] == ["org-1"]
    assert entry["quarantined"] == ["org-2"]


def test_without_privacy_there_is_no_epsilon_to_state(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=1)
    grid = federation(folder.plan, {"org-1": adding(1.0), "org-2": stating(epsilon=1.0)})
    assert train_rounds(grid, folder, model_of(folder.plan), lambda state: None).history[0]["quarantined"] == ["org-2"]


@pytest.mark.parametrize("value", [1e308, math.inf, math.nan, -1e308, 10**400])
def test_a_run_that_holds_one_already_is_shown(new_run: NewRun, value: float) -> None:
    folder = real(new_run("org-1", "org-2", rounds=1, privacy=PRIVACY))
    grid = wild(folder, {"org-1": stating(epsilon=8.0), "org-2": stating(epsilon=8.0)})
    progress = train_rounds(grid, folder, model_of(folder.plan), lambda state: None)
    progress.history[0]["epsilon"]["org-2"] = value
    summary = json.loads(to_json(summarize(folder, progress)))
    assert "org-2" in render_report(summary)


@given(NUMBERS)
def test_no_formatter_raises(value: float) -> None:
    for write in (percent, signed, scientific, size, duration, round_up):
        assert write(value)
    assert isinstance(round_up_number(value), int | float)
    fields = {"round": 1, "organization": "a", "bytes": 1, "epsilon": value, "reason": "", "of_round": 1}
    assert remote_line("update_received", fields)
    entry = {
        "round": 1,
        "stage": "head",
        "participants": ["a"],
        "metrics": None,
        "epsilon": {"a": value},
        "bytes_up": 1,
        "bytes_down": 1,
    }
    assert _round_line(entry, 2, 1.0)


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_an_epsilon_never_reads_smaller_than_it_is(value: float) -> None:
    assert float(round_up(value)) >= value * (1 - 1e-9) - 1e-9
