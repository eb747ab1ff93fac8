"""Regression through real processes: with ε, a killed organization, and a model that tells numbers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cotune.client.site import Site
from tests.support.deployment import bring_back, deployment
from tests.support.text_tasks import rated

pytestmark = [pytest.mark.long, pytest.mark.crash]


def write_ratings(file: Path, seed: int) -> None:
    """With one record that has no number."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "label"])
        table.writerows([row["text"], row["label"]] for row in rated(200, seed))
        table.writerow(["a record", "unknown"])


def test_a_real_run_with_numbers_survives_a_kill_and_is_usable(tmp_path: Path) -> None:
    plan = {
        "task": "regression",
        "labels": [],
        "model": {"target_range": [1.0, 5.0]},
        "privacy": {"epsilon": 8.0, "delta": 0.001},
        "server": {"quorum": 1.0},
    }
    with deployment(tmp_path, "north", "south", plan=plan, write=write_ratings) as fed:
        fed.run()
        fed.wait(fed.reached("round_started", 2))
        fed.kill("north")
        bring_back(fed, "north")
        folder = fed.finish()
        fed.wait(lambda: len(list((fed.site("north") / "models").glob("*/*"))) > 0 or None)
    assert folder.load().round == 3
    assert not [event for event in fed.events("update_dropped", "update_quarantined") if "lost" not in event["reason"]]
    assert all(Site(fed.site(name)).ledger().spent() for name in ("north", "south"))
    summary = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["test"]["federated"]) == {"mse", "mae", "spearman", "r2"}
    assert summary["test"]["federated"]["mse"] < 10
    data = str(tmp_path / "test.csv")
    for words in (("predict", str(folder.path), "a text"), ("evaluate", str(folder.path), "--data", data)):
        command = [sys.executable, "-m", "cotune.cli.main", *words, "--json"]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if words[0] == "predict":
            assert isinstance(found[0]["value"], float)
        else:
            assert found["figures"]["mse"] == pytest.approx(summary["test"]["federated"]["mse"], rel=1e-4)
            assert found["left_out"] == {"label that is no number": 1}
    refused = subprocess.run(
        [sys.executable, "-m", "cotune.cli.main", "client", "adapt", str(fed.site("north"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "regression" in refused.stderr
