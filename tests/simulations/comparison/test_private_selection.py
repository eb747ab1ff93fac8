from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from safetensors.torch import load_file

from cotune.client.site import Site
from cotune.errors import PlanError, RunError
from cotune.plan.load import load_plan
from cotune.privacy.accounting.composition import epsilon
from cotune.reporting.comparison_statistics import Variation
from cotune.server.runs.events import observe_run
from cotune.simulations.comparison.candidates import Candidates
from cotune.simulations.comparison.compare import compare
from cotune.simulations.comparison.grid import build_grid, parse_variation
from cotune.simulations.comparison.private_selection import select
from cotune.simulations.comparison.private_selection_release import Selected
from cotune.simulations.joint_privacy_loss import get_steps_by_organization, max_divergences
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.processes import Cotune, Moment, kill_at

RATES = parse_variation("local.learning_rate=5,0.001,0.002")
PRIVATE = ["privacy.epsilon=8"]
RELEASED = {"results.json", "compare.html", "plan.toml", "model"}

Select = Callable[..., Selected]


@pytest.fixture(scope="module")
def private_plan(plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = plan_file.read_text(encoding="utf-8").replace('privacy = "none"\n', "")
    file = tmp_path_factory.mktemp("private") / "toy.toml"
    file.write_text(f"{text}\n[privacy]\nepsilon = 8.0\n", encoding="utf-8")
    return file


def selected(plan: Path, out: Path, rates: Variation = RATES, mean: float = 3.0, **more: Any) -> Selected:
    found, folder = select(plan, [rates], expected_runs=mean, out=out, jobs=1, device="cpu", **more)
    assert folder == out / "released"
    return found


def drawn(plan: Path, out: Path, draws: list[int], rates: Variation = RATES, mean: float = 3.0) -> Path:
    """A selection that was killed right after it had drawn."""
    file = out / "private" / "draws.json"
    file.parent.mkdir(parents=True)
    digest = Candidates.of(build_grid(plan, [rates], 1, [], "cpu"), mean).digest
    file.write_text(json.dumps({"digest": digest, "draws": draws}), encoding="utf-8")
    return file


def scores(out: Path) -> list[float]:
    runs = sorted((out / "private" / "runs").iterdir())
    return [json.loads((run / "summary.json").read_bytes())["test"]["federated"]["accuracy"] for run in runs]


def figures(out: Path) -> list[set[str]]:
    """Metrics of each run with enough digits that an equal number elsewhere is no coincidence."""
    runs = sorted((out / "private" / "runs").iterdir())
    tests = [json.loads((run / "summary.json").read_bytes())["test"]["federated"] for run in runs]
    return [{json.dumps(value) for value in test.values() if len(json.dumps(value)) > 12} for test in tests]


@pytest.fixture(scope="module")
def stopped(private_plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a selection among three runs that stopped when all were played and nothing was released. Not to be changed.

    Fresh noise decides how well each does; three that do equally well would show nothing, and are played again.
    """
    for _ in range(5):
        out = tmp_path_factory.mktemp("stopped") / "out"
        drawn(private_plan, out, [1, 0, 2])
        (out / "released").symlink_to(out.parent / "nowhere")  # no folder can be made there
        with pytest.raises(RunError, match="cannot be written"):
            selected(private_plan, out)
        (out / "released").unlink()
        if len(set(scores(out))) > 1:
            return out
    raise AssertionError("three runs with fresh noise did equally well five times")


@pytest.fixture
def played(private_plan: Path, stopped: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(plan, folder) of it: a copy for this test."""
    return private_plan, shutil.copytree(stopped, tmp_path / "out")


# --- what is chosen, and what leaves


def test_the_best_run_is_released_and_nothing_of_the_others(played: tuple[Path, Path]) -> None:
    plan, out = played
    reached = scores(out)
    best = max(range(3), key=reached.__getitem__)
    model = load_file(out / "private" / "runs" / f"{best:05d}" / "model" / "model.safetensors")
    of_each = figures(out)
    others = set.union(*(each for run, each in enumerate(of_each) if run != best)) - of_each[best]
    assert others, "the runs are to differ"

    found = selected(plan, out)

    value = RATES.values[[1, 0, 2][best]]
    assert found.settings == {"local.learning_rate": value}
    assert found.test["accuracy"] == reached[best] == max(reached)
    assert load_plan(out / "released" / "plan.toml").local.learning_rate == float(value)
    exported = load_file(out / "released" / "model" / "model.safetensors")
    assert exported.keys() == model.keys()
    assert all(exported[name].equal(model[name]) for name in model)
    assert {path.name for path in out.iterdir()} == {"released", ".lock"}
    assert {path.name for path in (out / "released").iterdir()} == RELEASED
    for file in (out / "released").rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert not any(figure in text for figure in others), file


def test_the_released_json_has_these_keys_and_no_others(played: tuple[Path, Path]) -> None:
    plan, out = played
    found = selected(plan, out)
    written = json.loads((out / "released" / "results.json").read_bytes())
    assert set(written) == {
        *("schema", "plan", "vary", "plans", "expected_runs", "digest", "settings", "seed", "plan_id", "test", "test_examples"),
        *("epsilon", "delta", "epsilon_one_run", "unit", "statement"),
    }
    assert set(written["test"]) == {"accuracy", "precision", "recall", "f1"}
    assert (written["epsilon"], written["delta"]) == (found.epsilon, found.delta)


def test_listener_and_runs_reveal_no_single_run(private_plan: Path, tmp_path: Path) -> None:
    drawn(private_plan, tmp_path / "out", [0, 1])
    heard: list[str] = []
    selected(private_plan, tmp_path / "out", listener=lambda event, _: heard.append(event))
    assert set(heard) == {"cell_checked", "selection_started"}
    assert heard.count("selection_started") == 1


def test_the_costliest_plan_decides_what_is_stated(private_plan: Path, tmp_path: Path) -> None:
    """By dp-accounting's own event for this mechanism, from the charges of the larger of two ε."""
    epsilons = parse_variation("privacy.epsilon=2,6")
    out = tmp_path / "out"
    drawn(private_plan, out, [0], epsilons, 10.0)
    found = selected(private_plan, out, epsilons, 10.0)
    assert found.settings == {"privacy.epsilon": "2"}
    costly = [cell.promise.charges for cell in build_grid(private_plan, [epsilons], 1, [], "cpu")][1]
    accountants = []
    for steps in costly:
        accountant = RdpAccountant(orders=list(range(2, 257)))
        event = dp_event.ComposedDpEvent([each.event() for each in steps])
        accountants.append(accountant.compose(dp_event.RepeatAndSelectDpEvent(event, 10.0, 1)))
    expected = max(accountant.get_epsilon(found.delta) for accountant in accountants)
    assert expected - 1e-9 <= found.epsilon <= 1.02 * expected
    assert found.epsilon > found.epsilon_one_run == max(epsilon(steps, found.delta) for steps in costly)


def test_what_a_run_is_charged_is_what_was_planned(played: tuple[Path, Path]) -> None:
    plan, out = played
    planned = [cell.promise.charges for cell in build_grid(plan, [RATES], 1, [], "cpu")]
    for run, draw in zip(sorted((out / "private" / "runs").iterdir()), [1, 0, 2], strict=True):
        assert max_divergences(get_steps_by_organization(run)) == pytest.approx(max_divergences(planned[draw]))


def test_a_run_that_fails_is_a_result_like_any_other(private_plan: Path, tmp_path: Path) -> None:
    norms = parse_variation("server.max_update_norm=1e-30,1000")
    drawn(private_plan, tmp_path / "out", [0, 1, 0], norms)
    assert selected(private_plan, tmp_path / "out", norms).settings == {"server.max_update_norm": "1000"}

    drawn(private_plan, tmp_path / "none", [0], norms)
    played: list[str] = []
    for _ in range(2):  # it is not tried again
        with (
            fails_with("run.nothing_selected"),
            observe_run(lambda event, fields: played.append(event)),
        ):
            selected(private_plan, tmp_path / "none", norms)
    assert played.count("run_failed") == 1
    assert not (tmp_path / "none" / "released").exists()


# --- killed and continued


def command(plan: Path, out: Path) -> tuple[str | Path, ...]:
    vary = f"{RATES.key}={','.join(RATES.values)}"
    return ("compare", plan, "--vary", vary, "--private-selection", "3", "--out", out, "--jobs", "1", "--device", "cpu")


@pytest.mark.crash
def test_killed_right_after_drawing_it_does_not_draw_again(private_plan: Path, cotune: Cotune, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draws = out / "private" / "draws.json"
    out.mkdir()
    (out / "released").symlink_to(tmp_path / "nowhere")  # so that the runs stay where they can be seen
    kill_at(cotune, Moment("renamed", {"path": "*/draws.json"}), *command(private_plan, out))
    first = draws.read_bytes()
    assert (out / "private").stat().st_mode & 0o077 == 0
    with pytest.raises(RunError, match="cannot be written"):
        selected(private_plan, out)
    assert draws.read_bytes() == first
    runs = sorted((out / "private" / "runs").iterdir())
    rates = [load_plan(run / "plan.toml").local.learning_rate for run in runs]
    assert rates == [float(RATES.values[draw]) for draw in json.loads(first)["draws"]]


@pytest.mark.crash
def test_killed_in_a_run_it_goes_on_from_there(private_plan: Path, cotune: Cotune, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draws = drawn(private_plan, out, [1, 2, 0, 1])
    runs = out / "private" / "runs"
    first = draws.read_bytes()
    kill_at(cotune, Moment("renamed", {"path": "*/runs/00001/run.json"}), *command(private_plan, out))
    finished = (runs / "00000" / "summary.json").read_bytes()
    assert not (runs / "00003").exists()
    assert not (out / "released").exists()

    kill_at(cotune, Moment("renamed", {"path": "*/runs/00003/run.json"}), *command(private_plan, out))
    assert draws.read_bytes() == first
    assert (runs / "00000" / "summary.json").read_bytes() == finished
    found = selected(private_plan, out)
    assert found.test["accuracy"] >= json.loads(finished)["test"]["federated"]["accuracy"]
    assert {path.name for path in out.iterdir()} == {"released", ".lock"}


def test_interrupted_run_charged_more_raises_epsilon(played: tuple[Path, Path]) -> None:
    plan, out = played
    candidates = Candidates.of(build_grid(plan, [RATES], 1, [], "cpu"), 3.0)
    runs = sorted((out / "private" / "runs").iterdir())
    planned = candidates.epsilon_selected()
    assert candidates.epsilon_selected(runs) == planned
    ledger = Site(runs[1] / "sites" / "org-1").ledger()
    charge = ledger.charges()[0]
    ledger.reserve(charge.plan_id, 1, charge.steps, data=charge.data)  # a round that was cut off
    assert candidates.epsilon_selected(runs) > planned
    assert selected(plan, out).epsilon > planned


@pytest.mark.parametrize("moment", ["before the release", "in the release", "after the release"])
def test_selection_killed_at_its_end_releases_the_same_run(played: tuple[Path, Path], tmp_path: Path, moment: str) -> None:
    plan, out = played
    expected = max(scores(out))
    whole = shutil.copytree(out, tmp_path / "whole")
    if moment == "in the release":
        (out / "released").mkdir()
        (out / "released" / "plan.toml").write_text("half")
    if moment == "after the release":
        selected(plan, out)
        shutil.copytree(whole / "private", out / "private")
    started: list[str] = []
    with observe_run(lambda event, _: started.append(event)):
        found = selected(plan, out)
    assert not started, "what is finished is not played again"
    assert found.test["accuracy"] == expected
    assert found == selected(plan, whole)
    assert not (out / "private").exists()


def test_a_finished_selection_is_shown_again_and_not_drawn_again(private_plan: Path, tmp_path: Path) -> None:
    found = selected(private_plan, tmp_path / "out", mean=1.0)
    again: list[str] = []
    with observe_run(lambda event, _: again.append(event)):
        assert selected(private_plan, tmp_path / "out", mean=1.0) == found
    assert not again


def test_a_run_that_is_cut_off_from_outside_is_no_result(private_plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    drawn(private_plan, out, [0, 1])
    blocked = out / "private" / "runs" / "00000" / "model"

    def blocks(event: str, fields: dict[str, Any]) -> None:
        if event == "run_finished":
            blocked.touch()  # the export cannot be written

    with fails_with("run.cut_off"), observe_run(blocks):
        selected(private_plan, out)
    blocked.unlink()
    assert not (out / "released").exists()
    assert selected(private_plan, out).test


# --- what is refused


@pytest.mark.parametrize(
    ("variation", "overrides", "message"),
    [
        ('privacy={epsilon=8},"none"', [], 'privacy="none": the plan has no record-level privacy'),
        ("local.steps=1,2", ["simulation.baselines=['alone']"], "trains baselines"),
        ("local.steps=1,2", ["client_privacy={epsilon=8,delta=0.01}"], "client_privacy"),
        ("test_fraction=0.1,0.2", [], "are tested on different records"),
        ("validation_fraction=0.1,0.2", [], "are tested on different records"),
        ("local.steps=1,2", ["train='lora'", "lora.factors='ab'", "lora.keep='b'"], "keeps a part of the model"),
    ],
)
def test_plans_among_which_nothing_can_be_chosen_privately(
    private_plan: Path, tmp_path: Path, variation: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(PlanError) as refused:
        selected(private_plan, tmp_path / "out", parse_variation(variation), overrides=overrides)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_plans_on_other_records_are_refused(private_plan: Path, tmp_path: Path) -> None:
    files = [str(write_csv(tmp_path / f"{seed}.csv", sentences(240, seed=seed))) for seed in (1, 2)]
    with fails_with("plan.not_selectable"):
        selected(private_plan, tmp_path / "out", Variation("data", tuple(files)))


def test_a_mean_below_one_is_refused(private_plan: Path, tmp_path: Path) -> None:
    with fails_with("privacy.invalid_repetitions", "1"):
        selected(private_plan, tmp_path / "out", mean=0.5)


def test_a_folder_that_holds_something_else_is_refused(private_plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    selected(private_plan, out, mean=1.0)
    once: dict[str, Any] = {"seeds": 1, "jobs": 1, "device": "cpu"}
    for refused in (
        lambda: selected(private_plan, out, mean=2.0),
        lambda: selected(private_plan, out, parse_variation("local.learning_rate=5,0.001"), mean=1.0),
        lambda: compare(private_plan, [parse_variation("local.steps=1")], out=out, **once),
    ):
        with pytest.raises(RunError, match="another folder|folder of its own"):
            refused()
    compare(private_plan, [parse_variation("local.steps=1")], out=tmp_path / "grid", **once)
    with fails_with("run.folder_exists", "grid"):
        selected(private_plan, tmp_path / "grid")


def test_damaged_draws_are_not_drawn_again(private_plan: Path, tmp_path: Path) -> None:
    file = drawn(private_plan, tmp_path / "out", [0])
    file.write_text("{", encoding="utf-8")
    with fails_with("run.damaged_document", "draws.json"):
        selected(private_plan, tmp_path / "out")
    assert file.read_text(encoding="utf-8") == "{"
