"""Several tasks through real processes: three organizations, of which one holds a single task, and one is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.client.site import Site
from tests.support.deployment import bring_back, deployment
from tests.support.multi_task import write_tasks

pytestmark = [pytest.mark.long, pytest.mark.crash]

NAMES = ("north", "south", "west")


def test_real_run_of_two_tasks_survives_a_kill(tmp_path: Path) -> None:
    plan = {
        "tasks": [
            {"name": "mood", "labels": ["bad", "good", "so"]},
            {"name": "length", "labels": ["long", "short"], "weight": 0.5},
        ],
        "labels": [],
        "train": "lora",
        "model": {"pooling": "auto"},
        "local": {"batch_size": 32},
        "privacy": {"epsilon": 8.0, "delta": 0.001},
        "server": {"quorum": 1.0},
    }

    def write(file: Path, seed: int) -> None:
        write_tasks(file, seed=seed)

    with deployment(tmp_path, *NAMES, plan=plan, write=write, options={"south": ("--tasks", "mood")}) as fed:
        fed.run()
        fed.wait(fed.reached("round_started", 2))
        fed.kill("south")
        bring_back(fed, "south")
        folder = fed.finish()
    assert folder.load().round == 3
    assert not [event for event in fed.events("update_dropped", "update_quarantined") if "lost" not in event["reason"]]
    assert all(Site(fed.site(name)).ledger().spent() for name in NAMES)
    assert sorted(path.parent.name for path in (folder.path / "model").glob("*/config.json")) == ["length", "mood"]
    test = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))["test"]
    assert test["federated"]["accuracy"] > 0
