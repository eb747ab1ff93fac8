"""The folder of a small run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.plan.load import parse_plan
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder

NewRun = Callable[..., RunFolder]


@pytest.fixture
def new_run(tmp_path: Path, base_model: Callable[[str], Path]) -> NewRun:
    """(organizations, changes of the plan) -> a fresh folder of a run that trains the head of a tiny bert."""
    numbers = itertools.count(1)

    def make(*names: str, **changes: Any) -> RunFolder:
        table = {
            "name": "toy",
            "rounds": 2,
            "labels": ["bad", "good", "so"],
            "model": {"base": str(base_model("bert")), "max_length": 16},
            "data": {"source": "nowhere.csv"},
            "privacy": "none",
        }
        people = tuple(Participant(name=name, site=f"sites/{name}") for name in names or ("org-1", "org-2"))
        file = RunFile(run="toy", created="2026-01-01T00:00:00+00:00", engine="in-process", device="cpu", participants=people)
        return RunFolder.create(tmp_path / f"run-{next(numbers)}", parse_plan({**table, **changes}), file)

    return make
