"""Simulations on several processes: they find what one finds, killed or not, and nobody outlives them."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from cotune.client.local_events import observe_client
from cotune.plan.plan import Plan
from cotune.server.runs.events import observe_run
from cotune.simulations.prepare import RUN_LEDGER
from cotune.simulations.run import Run, resume, simulate
from tests.support.failures import fails_with
from tests.support.processes import Cotune, Moment, finish, kill_at, started_workers, written
from tests.support.simulations import NewPlan, final_model, same, tensors_of, told

__all__ = ["started_workers"]  # fixtures


def of_three(toy_plan: NewPlan, **changes: Any) -> Plan:
    """One organization more than there are workers, of unlike sizes; each keeps tensors between rounds."""
    simulation = {"clients": 3, "partition": "quantity:1.0", "min_examples": 10, **changes.pop("simulation", {})}
    return toy_plan(rounds=2, strategy="scaffold", local={"momentum": 0.0}, simulation=simulation, **changes)


def private(toy_plan: NewPlan, **changes: Any) -> Plan:
    local = {"batch_size": 0.2, "learning_rate": 1.0, "steps": 3}
    return toy_plan(privacy={"epsilon": 2.0}, local=local, simulation={"clients": 3, "baselines": []}, **changes)


def history(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in run.summary["rounds"]]


def charges(run: Path) -> list[tuple[Any, ...]]:
    """(organization, round, purpose, σ, q, steps, state), from the file itself."""
    query = "SELECT owner, round, purpose, noise_multiplier, sample_rate, steps, state FROM charges ORDER BY owner, id"
    with closing(sqlite3.connect(f"{(run / RUN_LEDGER).as_uri()}?mode=ro", uri=True)) as db:
        return db.execute(query).fetchall()


def check_equal(one: Run, other: Run) -> None:
    """To the bit, of everything but times; the names of the folders are of one length, as requests name them."""
    assert same(final_model(one.folder), final_model(other.folder))
    assert tensors_of(one.folder) == tensors_of(other.folder)
    assert history(one) == history(other)
    assert one.summary["test"] == other.summary["test"]
    assert one.summary["organizations"] == other.summary["organizations"]


def test_workers_find_what_one_process_finds(toy_plan: NewPlan, tmp_path: Path, started_workers: list[ForkServerProcess]) -> None:
    plan = of_three(toy_plan, simulation={"baselines": ["alone", "pooled"], "pooled": {"steps": 2}})
    one = simulate(plan, tmp_path / "one", device="cpu")
    steps: list[dict[str, Any]] = []
    with observe_client(lambda event, fields: steps.append(fields)):
        two = simulate(plan, tmp_path / "two", device="cpu", workers=2)
    check_equal(one, two)
    assert len(started_workers) == 2
    assert two.summary["peak_memory_bytes"] > 1.5 * one.summary["peak_memory_bytes"]
    assert two.summary["engine"] == "in-process"
    trained = {(step.get("baseline"), step["organization"]) for step in steps}
    names = ("org-1", "org-2", "org-3")
    assert trained == {*((None, name) for name in names), *((f"alone/{name}", name) for name in names), ("pooled", "pooled")}


@pytest.mark.parametrize(("late", "charged"), [pytest.param("ignore", 3 * 2, marks=pytest.mark.long), ("fold", 3 * 3 - 1)])
def test_budgets_are_charged_as_in_one_process(toy_plan: NewPlan, tmp_path: Path, late: str, charged: int) -> None:
    """An organization that is asked to spare is not charged before its late update is wanted, in the next round."""
    plan = private(toy_plan, rounds=3, server={"sample_size": 2, "over_selection": 0.5, "late": late})
    one = simulate(plan, tmp_path / "one", device="cpu")
    two = simulate(plan, tmp_path / "two", device="cpu", workers=2)
    assert charges(one.folder) == charges(two.folder)
    assert len(charges(two.folder)) == charged
    for summary in (one.summary, two.summary):
        assert [len(entry["participants"]) for entry in summary["rounds"]] == [2, 2, 2]
    spent = [[each["epsilon_spent"] for each in run.summary["organizations"]] for run in (one, two)]
    assert spent[0] == spent[1]
    asked = ("round", "asked", "participants", "dropped", "steps", "epsilon", "bytes_down")
    assert [[e.get(key) for key in asked] for e in history(one)] == [[e.get(key) for key in asked] for e in history(two)]


def test_an_organization_that_fails_is_left_out_as_in_one_process(toy_plan: NewPlan, tmp_path: Path) -> None:
    """One declines by its policy, and another one's records are gone in the second round."""

    @contextmanager
    def breaking(run: Path) -> Iterator[None]:
        def look(event: str, fields: dict[str, Any]) -> None:
            if event == "run_started":
                (run / "sites" / "org-2" / "policy.toml").write_text("[training]\nmin_examples = 0\nmin_batch = 0\n")
            if event == "round_started" and fields["round"] == 2:
                (run / "sites" / "org-3" / "data.json").unlink()

        with observe_run(look):
            yield

    plan = toy_plan(rounds=2, simulation={"clients": 3, "baselines": []}, server={"quorum": 0.3})
    found = []
    for name, workers in (("one", 1), ("two", 2)):
        with breaking(tmp_path / name):
            found.append(simulate(plan, tmp_path / name, device="cpu", workers=workers))
    one, two = found
    assert [entry["participants"] for entry in two.summary["rounds"]] == [["org-1", "org-3"], ["org-1"]]
    reasons = [[(who["organization"], who["reason"]) for who in entry["dropped"]] for entry in two.summary["rounds"]]
    assert reasons[0][0][1].startswith("declined by the rule")
    assert re.sub("/two/", "/one/", str(reasons)) == str(
        [[(who["organization"], who["reason"]) for who in entry["dropped"]] for entry in one.summary["rounds"]]
    )
    assert same(final_model(one.folder), final_model(two.folder))


# --- who may not use them


@pytest.mark.parametrize("workers", [0, -1])
def test_no_number_of_processes_is_refused(toy_plan: NewPlan, tmp_path: Path, workers: int) -> None:
    with fails_with("plan.invalid_workers", str(workers)):
        simulate(toy_plan(), tmp_path / "run", device="cpu", workers=workers)
    assert not (tmp_path / "run").exists()


def test_ray_takes_no_workers(toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.simulations.run.check_engine", lambda engine: None)  # whether or not it is installed
    with fails_with("plan.workers_on_ray", "2", "ray"):
        simulate(toy_plan(), tmp_path / "new", engine="ray", device="cpu", workers=2)
    assert not (tmp_path / "new").exists()
    run = simulate(toy_plan(rounds=1), tmp_path / "run", device="cpu").folder
    file = run / "run.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"in-process"', '"ray"'), encoding="utf-8")
    with fails_with("plan.workers_on_ray"):
        resume(run, workers=2)


# --- kills


def kill(workers: list[ForkServerProcess]) -> None:
    for process in workers:
        if process.is_alive():
            process.kill()


@pytest.mark.crash
def test_killed_workers_are_started_again(toy_plan: NewPlan, tmp_path: Path, started_workers: list[ForkServerProcess]) -> None:
    """All of them: in training, between two steps, after the last one, and in a baseline."""
    plan = of_three(toy_plan, simulation={"baselines": ["alone"]})
    moments = [("org-1", 1, 2), ("org-2", 2, 5), ("alone/org-2", 1, 1)]  # (organization or baseline, round, step)
    killed: list[tuple[str, int, int]] = []

    def look(event: str, fields: dict[str, Any]) -> None:
        moment = (fields.get("baseline", fields.get("organization")), fields.get("round", 0), fields.get("step", 0))
        if moment in moments and moment not in killed:
            killed.append(moment)
            kill(started_workers)

    with observe_client(look):
        two = simulate(plan, tmp_path / "two", device="cpu", workers=2)
    assert sorted(killed) == sorted(moments)
    assert len(started_workers) >= 2 + len(moments)
    check_equal(simulate(plan, tmp_path / "one", device="cpu"), two)


@pytest.mark.crash
def test_a_charge_of_a_killed_worker_counts(toy_plan: NewPlan, tmp_path: Path, started_workers: list[ForkServerProcess]) -> None:
    killed: list[int] = []

    def look(event: str, fields: dict[str, Any]) -> None:
        if event == "step" and (fields["organization"], fields["round"]) == ("org-2", 2) and not killed:
            killed.append(fields["step"])
            kill(started_workers)

    with observe_client(look):
        run = simulate(private(toy_plan), tmp_path / "run", device="cpu", workers=2)
    rows = [(round, steps, state) for who, round, _, _, _, steps, state in charges(run.folder) if who == "org-2"]
    assert [row for row in rows if row[0] != 2] == [(1, 3, "settled"), (3, 3, "settled")]
    assert [state for round, _, state in rows if round == 2] in (
        ["reserved", "settled"],  # killed while it trained: again, and both count
        ["reserved"],  # killed when its update was kept: that is given back
        ["settled"],  # killed when it had answered
    )
    organization = run.summary["organizations"][1]
    assert organization["epsilon_spent"] <= 2.0
    assert [entry["participants"] for entry in run.summary["rounds"]] == [["org-1", "org-2", "org-3"]] * 3


@pytest.mark.crash
@pytest.mark.parametrize(
    "deadly",
    [
        pytest.param({"organization": "org-2", "round": 2}, id="round"),
        pytest.param({"baseline": "alone/org-2"}, id="baseline", marks=pytest.mark.long),
    ],
)
def test_work_that_kills_its_workers_ends_the_run(
    toy_plan: NewPlan, tmp_path: Path, started_workers: list[ForkServerProcess], deadly: dict[str, Any]
) -> None:
    """As where memory runs out again and again; what is beside it dies, too. The run goes on with another number of workers."""
    plan = of_three(toy_plan, simulation={"baselines": ["alone"]})

    def look(event: str, fields: dict[str, Any]) -> None:
        if event == "step" and all(fields.get(key) == value for key, value in deadly.items()):
            kill(started_workers)

    with observe_client(look), fails_with("run.worker_died", "-9", "--resume", "--workers"):
        simulate(plan, tmp_path / "two", device="cpu", workers=2)
    assert not (tmp_path / "two" / "summary.json").exists()
    assert not any(process.is_alive() for process in started_workers)
    check_equal(simulate(plan, tmp_path / "one", device="cpu"), resume(tmp_path / "two", workers=3))


def processes_in(folder: Path) -> set[int]:
    """Those that work in a folder: a test's own, and what they have started, also where a server forked it."""
    found = set()
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.crash
@pytest.mark.long
def test_a_killed_run_ends_its_workers_and_goes_on(toy_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = of_three(toy_plan, simulation={"baselines": ["alone"]})
    arguments: tuple[str | Path, ...] = ("simulate", written(plan, tmp_path), "--out", tmp_path / "two", "--device", "cpu")
    for moment in (
        Moment("step", {"organization": "org-2", "round": 1}, nth=2),
        Moment("update_received", {"organization": "org-2", "round": 2}),
        Moment("baseline_started"),
    ):
        kill_at(cotune, moment, *arguments, "--workers", "2")
        wait_for(lambda: not processes_in(tmp_path))
        arguments = ("simulate", "--resume", tmp_path / "two")
    finish(cotune(*arguments, "--workers", "2"), tmp_path / "cotune.log")
    check_equal(simulate(plan, tmp_path / "one", device="cpu"), resume(tmp_path / "two"))


@pytest.mark.long
def test_an_interrupt_ends_the_workers_too(toy_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    run = tmp_path / "two"
    plan = of_three(toy_plan, simulation={"baselines": []})
    process: BaseProcess = cotune("simulate", written(plan, tmp_path), "--out", run, "--device", "cpu", "--workers", "2")
    assert process.pid is not None
    wait_for(lambda: bool(told(run, "update_received")))
    os.kill(process.pid, signal.SIGINT)
    process.join(600)
    assert process.exitcode == 130
    wait_for(lambda: not processes_in(tmp_path))
    assert (tmp_path / "cotune.log").read_text(encoding="utf-8").splitlines()[-1].startswith("cotune: stopped")
