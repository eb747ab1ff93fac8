"""A head that reads layers, through real processes: every organization makes the public map by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.deployment import bring_back, deployment

pytestmark = [pytest.mark.long, pytest.mark.crash]


def test_real_run_on_layers_survives_a_kill_and_is_usable(tmp_path: Path) -> None:
    plan = {
        "model": {"pooling": "auto", "feature": {"layers": [0, 1]}},
        "privacy": {"epsilon": 8.0, "delta": 0.001},
        "local": {"batch_size": "all", "steps": 1},
        "server": {"quorum": 1.0},
    }
    with deployment(tmp_path, "north", "south", plan=plan) as fed:
        fed.run()
        fed.wait(fed.reached("round_started", 2))
        fed.kill("north")
        bring_back(fed, "north")
        folder = fed.finish()
        fed.wait(lambda: len(list((fed.site("north") / "models").glob("*/*"))) > 0 or None)
    assert folder.load().round == 3
    assert folder.plan.model.feature is not None
    assert folder.plan.model.feature.map_hash is not None
    assert not [event for event in fed.events("update_dropped", "update_quarantined") if "lost" not in event["reason"]]
    for words in (("evaluate",), ("adapt",)):
        command = [sys.executable, "-m", "cotune.cli.main", "client", *words, str(fed.site("north"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    out = subprocess.run(
        [sys.executable, "-m", "cotune.cli.main", "predict", str(folder.path), "a great day", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "good" in json.dumps(json.loads(out.stdout))
