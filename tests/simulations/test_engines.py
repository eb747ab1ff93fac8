from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cotune.errors import PlanError
from cotune.plan.load import dump_plan
from cotune.simulations.engines import ENGINES, check_engine
from cotune.simulations.run import simulate
from tests.support.simulations import NewPlan, final_model, same

ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def test_an_unknown_engine_is_refused_before_anything_is_made(toy_plan: NewPlan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r'unknown engine "in-proces"; did you mean \'in-process\'\? Known: in-process, ray'):
        simulate(toy_plan(), tmp_path / "run", engine="in-proces", device="cpu")
    assert not (tmp_path / "run").exists()


def test_ray_that_is_not_installed_is_refused_before_anything_is_made(
    toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "ray" else find(name, package))
    with pytest.raises(PlanError, match=r"pip install .cotune\[ray\]"):
        simulate(toy_plan(), tmp_path / "run", engine="ray", device="cpu")
    assert not (tmp_path / "run").exists()
    check_engine("in-process")
    assert set(ENGINES) == {"in-process", "ray"}


@ray
def test_ray_trains_the_same_model_and_a_failure_there_is_a_failure_of_the_command(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Two stages on Ray's worker processes; then a server that cannot go on."""
    plan = toy_plan(
        train=[{"mode": "head", "rounds": 1}, {"mode": "full", "rounds": 1, "local": {"learning_rate": 0.1, "momentum": 0.0}}],
        simulation={"baselines": []},
    )
    (tmp_path / "plan.toml").write_text(dump_plan(plan), encoding="utf-8")
    whole = simulate(plan, tmp_path / "in-process", device="cpu")

    def cotune(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "cotune"), *arguments]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: the order of a sum depends on it
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environ)

    done = cotune("simulate", "plan.toml", "--out", "on-ray", "--engine", "ray", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "on-ray"
    assert same(final_model(run), final_model(whole.folder))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["engine"] == "ray"
    assert summary["test"] == whole.summary["test"]
    assert summary["organizations"] == whole.summary["organizations"]

    (run / "checkpoints" / "round-00002.safetensors").unlink()
    (run / "checkpoints" / "round-00001.safetensors").write_bytes(b"damaged")
    failed = cotune("simulate", "--resume", "on-ray")
    assert failed.returncode == 1, failed.stderr
    assert "round-00001.safetensors is damaged" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
