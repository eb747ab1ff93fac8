"""Runs whose model travels as changes of the version that an organization has: the same bits as with the whole model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cotune.client import held_state
from cotune.plan.plan import Plan
from cotune.server.runs.events import observe_run, read_events
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.run import Run, simulate
from tests.support.simulations import NewPlan, final_model, same, tensors_of

STAGES = [{"mode": "head", "rounds": 2}, {"mode": "lora", "rounds": 3}]  # the second adds parameters
LONG = pytest.mark.long
LORA = {"lora": {"rank": 2}, "model": {"pooling": "native"}, "train": "lora"}


@pytest.fixture(scope="module")
def exact(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(toy_plan(), tmp_path_factory.mktemp("exact") / "run", device="cpu")


@pytest.mark.parametrize("codec", [pytest.param("bfloat16", marks=LONG), "int8", pytest.param("int4", marks=LONG)])
def test_a_run_learns_as_well(toy_plan: NewPlan, tmp_path: Path, exact: Run, codec: str) -> None:
    run = simulate(toy_plan(wire_down=codec), tmp_path / "run", device="cpu")
    assert not same(final_model(run.folder), final_model(exact.folder))
    assert run.summary["test"]["federated"]["accuracy"] >= exact.summary["test"]["federated"]["accuracy"] - 0.05


def test_later_rounds_take_fewer_bytes(toy_plan: NewPlan, tmp_path: Path) -> None:
    whole = simulate(toy_plan(wire="int4", **LORA), tmp_path / "whole", device="cpu").summary["rounds"]
    down = {
        codec: [entry["bytes_down"] for entry in simulate(plan, tmp_path / codec, device="cpu").summary["rounds"]]
        for codec in ("bfloat16", "int8", "int4")
        for plan in [toy_plan(wire="int4", wire_down=codec, **LORA)]
    }
    beside = 2 * len(toy_plan(**LORA).canonical())  # the plan itself
    arrays = whole[0]["bytes_down"] - beside
    for codec, times in (("bfloat16", 2), ("int8", 3), ("int4", 4)):  # names and headers count, too
        first, *later = down[codec]
        assert first > arrays
        assert all(size < arrays / times + beside + 4_000 for size in later), (codec, down, arrays, beside)


def without_sizes(run: Run) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if key not in ("seconds", "bytes_down")} for entry in run.summary["rounds"]
    ]


def staged(toy_plan: NewPlan, **changes: Any) -> Plan:
    return toy_plan(**{**LORA, "train": STAGES, "wire": "int8", "wire_down": "int8", **changes})


def whole_states(run: Path) -> list[tuple[int, str]]:
    events = read_events(run / "events.jsonl")
    return [(event["round"], event["organization"]) for event in events if event.event == "whole_state_sent"]


@contextmanager
def at_round(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Act when a round begins, before anybody is asked."""

    def watch(event: str, fields: dict[str, Any]) -> None:
        if event == "round_started" and fields["round"] == number:
            act()

    with observe_run(watch):
        yield


def lose(run: Path) -> None:
    shutil.rmtree(next((run / "sites" / "org-1" / "kept").glob("*/received")))


def damage(run: Path) -> None:
    [file] = (run / "sites" / "org-1" / "kept").glob("*/received/state.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of a value: it can still be read
    file.write_bytes(content)


@pytest.fixture(scope="module")
def undisturbed(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(staged(toy_plan), tmp_path_factory.mktemp("undisturbed") / "run", device="cpu")


@pytest.mark.parametrize("harm", [lose, damage])
def test_who_lost_its_version_gets_the_whole_in_the_same_round(
    toy_plan: NewPlan, tmp_path: Path, undisturbed: Run, harm: Callable[[Path], None]
) -> None:
    assert whole_states(undisturbed.folder) == []
    path = tmp_path / "run"
    with at_round(4, lambda: harm(path)):
        run = simulate(staged(toy_plan), path, device="cpu")
    assert whole_states(path) == [(4, "org-1")]
    assert same(final_model(path), final_model(undisturbed.folder))
    assert tensors_of(path) == tensors_of(undisturbed.folder)
    assert without_sizes(run) == without_sizes(undisturbed)


def test_a_server_without_its_changes_sends_the_whole(toy_plan: NewPlan, tmp_path: Path, undisturbed: Run) -> None:
    path = tmp_path / "run"
    with at_round(4, lambda: shutil.rmtree(path / "changes")):
        run = simulate(staged(toy_plan), path, device="cpu")
    assert whole_states(path) == []
    assert tensors_of(path) == tensors_of(undisturbed.folder)
    down = [[entry["bytes_down"] for entry in each.summary["rounds"]] for each in (run, undisturbed)]
    more = [one > other + 1000 for one, other in zip(*down, strict=True)]  # requests name the folders, too
    assert more == [False, False, False, True, False]


def test_a_changed_file_of_the_server_is_noticed_by_organizations(toy_plan: NewPlan, tmp_path: Path, undisturbed: Run) -> None:
    """What they build has another digest than the request names: they ask for the whole, and nobody trains from anything else."""
    path = tmp_path / "run"

    def change() -> None:
        file = path / "changes" / "round-00003.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    with at_round(4, change):
        simulate(staged(toy_plan), path, device="cpu")
    assert whole_states(path) == [(4, "org-1"), (4, "org-2")]
    assert tensors_of(path) == tensors_of(undisturbed.folder)


def test_who_is_asked_now_and_then_catches_up(toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three organizations two are drawn in each round: they get the changes of one round or of several."""
    few = {"simulation": {"clients": 3}, "server": {"sample_size": 2}, "local": {"learning_rate": 0.1, "steps": 1}}
    large = {**LORA, "lora": {"rank": 64}}  # of small arrays, the names and heads alone cost more than is saved
    plan = toy_plan(rounds=9, wire_down="int4", **few, **large)
    built: list[int] = []
    complete = held_state._build

    def noted(held: Any, request: Any, since: int) -> Any:
        built.append(len(request.changes) - since)
        return complete(held, request, since)

    monkeypatch.setattr(held_state, "_build", noted)
    run = simulate(plan, tmp_path / "run", device="cpu")
    assert whole_states(run.folder) == []
    assert {1, 2} <= set(built)
    monkeypatch.setattr(held_state, "_read", lambda file: {})
    forgetful = simulate(plan, tmp_path / "forgetful", device="cpu")
    assert len(whole_states(forgetful.folder)) == len(built)
    assert tensors_of(forgetful.folder) == tensors_of(run.folder)
    assert all(len(entry["participants"]) == 2 for entry in run.summary["rounds"])


@pytest.mark.parametrize(
    "strategy", ["scaffold", "flora", *(pytest.param(name, marks=LONG) for name in ("feddyn", "fedexp", "ties"))]
)
def test_strategies_go_on_from_rounded_states(toy_plan: NewPlan, tmp_path: Path, strategy: str) -> None:
    plan = toy_plan(wire_down="int4", strategy=strategy, local={"momentum": 0.0}, **LORA)
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    assert all(len(entry["participants"]) == 2 for entry in summary["rounds"])


def test_privacy_costs_the_same(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Of records and of whole organizations: what the server rounds has its noise already."""
    private = {
        "privacy": {"epsilon": 8.0, "delta": 1e-3},
        "client_privacy": {"epsilon": 50.0, "delta": 1e-2, "clip_norm": 1.0},
        "local": {"batch_size": 40, "learning_rate": 0.1},
        "strategy": {"weighting": "uniform"},
    }
    spent = []
    for codec in ("float32", "int4"):
        rounds = simulate(toy_plan(wire_down=codec, **private), tmp_path / codec, device="cpu").summary["rounds"]
        assert all(len(entry["participants"]) == 2 for entry in rounds)
        spent.append([(entry["epsilon"], entry["client_privacy"]["epsilon"]) for entry in rounds])
    assert spent[0] == spent[1]


def test_smaller_ranks_go_on_from_rounded_states(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(wire_down="int8", strategy="flexlora", simulation={"ranks": [1, 2]}, **LORA)
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    assert all(len(entry["participants"]) == 2 for entry in summary["rounds"])


def test_the_checkpoint_holds_what_rounding_has_lost(undisturbed: Run) -> None:
    progress = RunFolder(undisturbed.folder).load()
    assert not [name for name in progress.memory if name.startswith("wire_down/")]  # the last round makes up for it
