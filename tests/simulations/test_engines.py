from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from cotune.flower.inprocess_grid import InProcessGrid
from cotune.plan.load import dump_plan
from cotune.plan.plan import Plan
from cotune.simulations.engines import ENGINES, check_engine
from cotune.simulations.run import resume, simulate
from tests.support.failures import fails_with
from tests.support.simulations import NewPlan, final_model, same

ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def test_an_unknown_engine_is_refused_before_anything_is_made(toy_plan: NewPlan, tmp_path: Path) -> None:
    with fails_with("plan.unknown_engine", "in-proces", "in-process"):
        simulate(toy_plan(), tmp_path / "run", engine="in-proces", device="cpu")
    assert not (tmp_path / "run").exists()


def test_missing_ray_is_refused_before_anything_is_created(
    toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "ray" else find(name, package))
    with fails_with("plan.missing_package"):
        simulate(toy_plan(), tmp_path / "run", engine="ray", device="cpu")
    assert not (tmp_path / "run").exists()
    check_engine("in-process")
    assert set(ENGINES) == {"in-process", "ray"}


def staged(toy_plan: NewPlan, **changes: Any) -> Plan:
    """Two stages, so that a run goes on with other parameters."""
    full = {"learning_rate": 0.1, "momentum": 0.0}
    stages = [{"mode": "head", "rounds": 1}, {"mode": "full", "rounds": 1, "local": full}]
    return toy_plan(train=stages, simulation={"baselines": []}, **changes)


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`cotune ARGUMENTS` in the folder."""
    command = [str(Path(sys.executable).parent / "cotune"), *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: the order of a sum depends on it
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environ)


@ray
@pytest.mark.long
def test_ray_trains_the_same_model(toy_plan: NewPlan, tmp_path: Path) -> None:
    """On Ray's worker processes."""
    plan = staged(toy_plan, wire_down="int8")
    (tmp_path / "plan.toml").write_text(dump_plan(plan), encoding="utf-8")
    whole = simulate(plan, tmp_path / "in-process", device="cpu")
    done = script(tmp_path, "simulate", "plan.toml", "--out", "on-ray", "--engine", "ray", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "on-ray"
    assert same(final_model(run), final_model(whole.folder))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["engine"] == "ray"
    assert summary["test"] == whole.summary["test"]
    assert summary["organizations"] == whole.summary["organizations"]


def damaged(toy_plan: NewPlan, folder: Path) -> Path:
    """A run of the engine "ray" that cannot go on: the checkpoint that it would go on from is no checkpoint."""
    simulate(staged(toy_plan), folder, device="cpu")
    (folder / "checkpoints" / "round-00002.safetensors").unlink()
    (folder / "checkpoints" / "round-00001.safetensors").write_bytes(b"damaged")
    file = folder / "run.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"in-process"', '"ray"'), encoding="utf-8")
    return folder


@ray
@pytest.mark.long
def test_a_failure_on_ray_is_a_failure_of_the_command(toy_plan: NewPlan, tmp_path: Path) -> None:
    damaged(toy_plan, tmp_path / "run")
    failed = script(tmp_path, "simulate", "--resume", "run")
    assert failed.returncode == 1, failed.stderr
    assert "round-00001.safetensors is damaged" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr


def without_ray(server: ServerApp, client: ClientApp, num_supernodes: int, **_: Any) -> None:
    """Flower's runtime, which wraps a failure in one of its own, for the short forms of the tests above."""
    context = Context(1, 1, UserConfig(), RecordDict(), UserConfig())
    try:
        server(InProcessGrid(client, num_supernodes), context)
    except Exception:
        raise RuntimeError("An error was encountered. Ending simulation.") from None


@ray
def test_flower_runtime_trains_the_same_model(toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.simulation.run_simulation", without_ray)
    whole = simulate(staged(toy_plan), tmp_path / "in-process", device="cpu")
    run = simulate(staged(toy_plan), tmp_path / "runtime", engine="ray", device="cpu")
    assert same(final_model(run.folder), final_model(whole.folder))
    assert (run.summary["engine"], whole.summary["engine"]) == ("ray", "in-process")
    assert run.summary["test"] == whole.summary["test"]


@ray
def test_failure_in_flower_runtime_is_reported_as_the_servers(
    toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr.simulation.run_simulation", without_ray)
    with fails_with("run.damaged_checkpoint", "round-00001.safetensors"):
        resume(damaged(toy_plan, tmp_path / "run"))
