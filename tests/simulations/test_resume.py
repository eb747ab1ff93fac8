from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.client.site import Site
from cotune.errors import CotuneError
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.server.runs.events import observe_run
from cotune.simulations.prepare import RUN_LEDGER
from cotune.simulations.run import resume, simulate
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.processes import Cotune, Moment, finish, kill_at, play_killed, written
from tests.support.simulations import NewPlan, final_model, same, tensors_of, told

# --- without privacy: as if nothing had happened


def slow(toy_plan: NewPlan, **changes: Any) -> Plan:
    """Two stages whose rounds take long enough to be killed in; with server momentum, which the checkpoints must carry."""
    full = {"learning_rate": 0.02, "optimizer": "adam", "momentum": 0.0, "steps": 6}
    return toy_plan(
        "shallow-bert",
        train=[{"mode": "head", "rounds": 2}, {"mode": "full", "rounds": 2, "local": full}],
        strategy={"server_optimizer": {"name": "sgd", "lr": 0.7, "momentum": 0.3}},
        **changes,
    )


CHECKPOINT = {"path": "*/checkpoints/round-00003.safetensors"}
FEW = (
    Moment("update_received", {"round": 2, "organization": "org-1"}),
    Moment("renamed", CHECKPOINT),
)
NARROW = (  # before and after the change of a round is there, and the version that an organization is to build on
    Moment("renamed", {"path": "*/received/state.safetensors"}, nth=3),
    Moment("renamed", {"path": "*/changes/round-00003.safetensors"}),
)
POOLED = {"baselines": ["pooled"], "pooled": {"steps": 2}}  # a run, as the plan says how it is trained
MANY = (
    Moment("round_started", {"round": 1}),
    Moment("step", {"round": 1, "organization": "org-2"}, nth=2),
    Moment("update_received", {"round": 2, "organization": "org-1"}),
    Moment("round_finished", {"round": 2}),
    Moment("round_started", {"round": 3}),
    Moment("step", {"round": 3, "organization": "org-1"}, nth=4),
    Moment("renamed", {"path": "*/sites/org-1/outbox/*"}),
    Moment("update_received", {"round": 3, "organization": "org-1"}),
    Moment("renamed", CHECKPOINT),
    Moment("update_received", {"round": 4, "organization": "org-2"}),
    Moment("baseline_started", {"baseline": "alone/org-1"}),
    Moment("baseline_started", {"baseline": "alone/org-2"}),
    Moment("baseline_started", {"baseline": "pooled"}),
    Moment("renamed", {"path": "*/report.html"}),
)


@pytest.mark.crash
@pytest.mark.parametrize(
    ("moments", "codec"),
    [
        pytest.param(FEW, "float32", marks=pytest.mark.long),
        (FEW, "int4"),
        (NARROW, "int4"),
        pytest.param(MANY, "int4", marks=pytest.mark.long),
    ],
    ids=["few", "few-int4", "narrow", "many-int4"],
)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(
    toy_plan: NewPlan, cotune: Cotune, tmp_path: Path, moments: Sequence[Moment], codec: str
) -> None:
    baselines = sorted({m.fields["baseline"].partition("/")[0] for m in moments if m.what == "baseline_started"})
    plan = slow(toy_plan, simulation={"baselines": baselines}, wire=codec, wire_down=codec)
    # of one length: a request names the folder, and its bytes are counted
    whole = tmp_path / "whole"
    run = tmp_path / "other"
    simulate(plan, whole, device="cpu")
    play_killed(cotune, plan, run, moments)

    assert same(final_model(run), final_model(whole))
    assert tensors_of(run) == tensors_of(whole)
    assert len(tensors_of(run)) == 4
    one, other = (json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (run, whole))
    for summary in (one, other):
        for entry in summary["rounds"]:
            del entry["seconds"]
    assert one["test"] == other["test"]
    assert one["organizations"] == other["organizations"]
    assert one["rounds"] == other["rounds"]
    assert (run / "report.html").exists()
    assert not [path for path in run.rglob("*.part") if path.parent.name == "model"]


@pytest.mark.crash
@pytest.mark.long
def test_the_console_script_goes_on_where_training_was_killed(toy_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = slow(toy_plan, simulation={"baselines": []})
    run = tmp_path / "run"
    script = Path(sys.executable).parent / "cotune"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: the order of a sum depends on it
    in_round_3 = Moment("step", {"round": 3}, nth=5)
    kill_at(cotune, in_round_3, "simulate", written(plan, tmp_path), "--out", run, "--device", "cpu")
    assert not told(run, "round_finished", round=3)
    command = [str(script), "simulate", "--resume", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert "going on after round 2" in done.stdout
    whole = simulate(plan, tmp_path / "whole", device="cpu")
    assert same(final_model(run), final_model(whole.folder))


# --- with privacy: what was spent stays spent

STEPS = 4


def charges(run: Path, organization: str) -> list[tuple[int, float, float, int, str]]:
    """(round, σ, q, steps, state), from the file itself."""
    query = "SELECT round, noise_multiplier, sample_rate, steps, state FROM charges WHERE owner = ? ORDER BY id"
    with closing(sqlite3.connect(f"{(run / RUN_LEDGER).as_uri()}?mode=ro", uri=True)) as db:
        return db.execute(query, (organization,)).fetchall()


def spent(rows: list[tuple[int, float, float, int, str]], delta: float) -> float:
    return epsilon([Steps(sigma, rate, steps) for _, sigma, rate, steps, _ in rows], delta)


@pytest.mark.crash
def test_killed_in_training_the_steps_count_and_the_budget_holds(toy_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = toy_plan(
        "shallow-bert",
        train="full",
        rounds=3,
        privacy={"epsilon": 1.5},
        local={"learning_rate": 0.05, "steps": STEPS, "batch_size": 0.2, "momentum": 0.0},
        simulation={"baselines": []},
    )
    run = tmp_path / "run"
    arguments: tuple[str | Path, ...] = ("simulate", written(plan, tmp_path), "--out", run, "--device", "cpu")
    for round, step in ((1, 1), (2, STEPS), (2, STEPS // 2)):  # twice in the training of org-2 in round 2
        kill_at(cotune, Moment("step", {"organization": "org-2", "round": round}, nth=step), *arguments)
        assert charges(run, "org-2")[-1][-1] == "reserved"
        arguments = ("simulate", "--resume", run)
    finish(cotune(*arguments), tmp_path / "cotune.log")

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    first, second = summary["organizations"]
    rows = charges(run, "org-2")
    assert [(round, steps, state) for round, _, _, steps, state in rows] == [
        *(
            (1, STEPS, "reserved"),
            (1, STEPS, "settled"),
            (2, STEPS, "reserved"),
            (2, STEPS, "reserved"),
            (2, STEPS, "settled"),
            (3, STEPS, "settled"),
        ),
    ]
    assert second["epsilon_spent"] == pytest.approx(spent(rows, second["delta"]))
    ran = [row for row in rows if row[-1] == "settled"]
    assert spent(ran, second["delta"]) < second["epsilon_spent"] <= second["epsilon_allowed"] == 1.5
    noise = [sigma for _, sigma, _, _, _ in rows]
    for before, after in pairwise(noise):  # what is left of the budget is spread over what is left of the run
        assert after > 0.999 * before
    assert noise[-1] > 1.1 * noise[0]
    # org-1 had finished its rounds before: its updates came from its outbox, and nothing was charged twice
    assert [(round, steps, state) for round, _, _, steps, state in charges(run, "org-1")] == [
        (r, STEPS, "settled") for r in (1, 2, 3)
    ]
    assert first["epsilon_spent"] <= 1.5
    assert first["steps"] == 3 * STEPS


def test_without_any_budget_left_the_organization_says_so(toy_plan: NewPlan, tmp_path: Path) -> None:
    """A ledger that was charged for other reasons is not overrun."""
    plan = toy_plan(privacy={"epsilon": 1.0}, local={"batch_size": 0.2, "learning_rate": 1.0}, simulation={"baselines": []})
    run = tmp_path / "run"

    def spends(event: str, fields: dict[str, Any]) -> None:
        if event == "round_started" and fields["round"] == 2:
            account = Site(run / "sites" / "org-2").ledger()
            [charge] = account.charges()
            account.reserve(charge.plan_id, 1, replace(charge.steps, count=500), data=charge.data)

    with observe_run(spends):
        result = simulate(plan, run, device="cpu")
    dropped = [entry["dropped"] for entry in result.summary["rounds"]]
    assert [[d["organization"] for d in each] for each in dropped] == [[], ["org-2"], ["org-2"]]
    assert "cannot be reached" in dropped[1][0]["reason"]
    assert [round for round, *_ in charges(run, "org-2")] == [1, 1]


# --- what can be resumed


@pytest.fixture
def stopped(toy_plan: NewPlan, tmp_path: Path) -> Path:
    """A run that failed in its second round of three, as org-1 could not read its data."""
    run = tmp_path / "run"
    site = run / "sites" / "org-1"

    def breaks(event: str, fields: dict[str, Any]) -> None:
        if event == "round_started" and fields["round"] == 2:
            (site / "data.json").rename(site / "aside")

    source = write_csv(tmp_path / "mine.csv", sentences(240))
    base = shutil.copytree(toy_plan().model.base, tmp_path / "base")
    plan = toy_plan(data={"source": str(source)}, model={"base": str(base)}, server={"quorum": 1.0}, simulation=POOLED)
    with fails_with("run.no_quorum", "2", "1", "2"), observe_run(breaks):
        simulate(plan, run, device="cpu")
    (site / "aside").rename(site / "data.json")
    return run


def test_a_failed_run_goes_on_after_its_last_finished_round(stopped: Path, tmp_path: Path, toy_plan: NewPlan) -> None:
    assert not (stopped / "summary.json").exists()
    result = resume(stopped)
    assert [r["round"] for r in result.summary["rounds"]] == [1, 2, 3]
    assert [told(stopped, "round_finished", round=round) for round in (1, 2, 3)] == [1, 1, 1]
    assert told(stopped, "run_started", resumed_after=1) == 1
    source = tmp_path / "mine.csv"
    base = tmp_path / "base"
    plan = toy_plan(data={"source": str(source)}, model={"base": str(base)}, server={"quorum": 1.0}, simulation=POOLED)
    assert same(final_model(stopped), final_model(simulate(plan, tmp_path / "whole", device="cpu").folder))


def test_a_finished_run_is_reported_again_and_not_trained_again(stopped: Path) -> None:
    first = resume(stopped)
    model = final_model(stopped)
    (stopped / "summary.json").unlink()
    (stopped / "report.html").unlink()
    began = told(stopped, "round_started"), told(stopped, "baseline_started")
    again = resume(stopped)
    assert (told(stopped, "round_started"), told(stopped, "baseline_started")) == began
    assert same(final_model(stopped), model)
    assert again.summary["test"] == first.summary["test"]
    assert (stopped / "report.html").exists()


def test_data_that_have_changed_are_noticed(stopped: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "mine.csv", sentences(240, seed=99))
    with pytest.raises(CotuneError):
        resume(stopped)


def test_data_that_have_become_fewer_are_noticed(stopped: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "mine.csv", sentences(200))
    with pytest.raises(CotuneError):
        resume(stopped)


def test_a_base_model_that_has_changed_is_noticed(stopped: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor + torch.finfo(torch.float32).eps for name, tensor in weights.items()}, file, {"format": "pt"})
    with fails_with("model.other_hash"):
        resume(stopped)


def test_a_damaged_checkpoint_is_not_passed_over(stopped: Path) -> None:
    checkpoint = stopped / "checkpoints" / "round-00001.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    with fails_with("run.damaged_checkpoint"):
        resume(stopped)
    checkpoint.unlink()
    assert [r["round"] for r in resume(stopped).summary["rounds"]] == [1, 2, 3]


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_what_is_not_a_run_cannot_be_resumed(tmp_path: Path, what: str) -> None:
    path = tmp_path / "it"
    if what == "a file":
        path.write_text("no run")
    elif what == "an empty folder":
        path.mkdir()
    with fails_with("run.not_a_run"):
        resume(path)


def test_a_second_process_on_the_same_run_is_refused(toy_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    run = tmp_path / "run"
    log = tmp_path / "cotune.log"
    plan = slow(toy_plan, simulation={"baselines": []})
    first = cotune("simulate", written(plan, tmp_path), "--out", run, "--device", "cpu")
    while not told(run, "round_started", round=1):
        time.sleep(0.005)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)  # it is not to be ready before the second one has looked
    with fails_with("run.locked"):
        resume(run)
    second = cotune("simulate", "--resume", run)
    second.join(600)
    os.kill(first.pid, signal.SIGCONT)
    assert second.exitcode == 1
    assert "cotune: another process is working on" in log.read_text(encoding="utf-8")
    finish(first, log)
    assert [told(run, "round_started", round=round) for round in (1, 2, 3, 4)] == [1, 1, 1, 1]
