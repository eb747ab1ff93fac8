from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.client.personalization.adaptation import adapt, build_own_records, get_unit_numbers, load_base_head
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.data.dataset import DatasetManifest
from cotune.data.metrics.metrics import Metrics
from cotune.models.encoding import encoded_features
from cotune.models.evaluation.test_set import evaluate
from cotune.models.trainable import State, get_model
from cotune.plan.plan import Plan
from cotune.server.runs.events import observe_run
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations import fitted_heads
from cotune.simulations.baselines import run_baselines
from cotune.simulations.prepare import Prepared, make_run, make_site, prepare
from tests.support.simulations import COMPARED, NewPlan, same


def made(plan: Plan, path: Path) -> tuple[RunFolder, Prepared]:
    prepared = prepare(plan, "cpu")
    return make_run(prepared, path, "in-process", "cpu"), prepared


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["alone", "pooled"], ["alone/org-1", "alone/org-2", "pooled"]),
        (["alone"], ["alone/org-1", "alone/org-2"]),
        (["pooled"], ["pooled"]),
        ([], []),
    ],
)
def test_only_what_the_plan_asks_for_is_trained(toy_plan: NewPlan, tmp_path: Path, wanted: list[str], names: list[str]) -> None:
    folder, prepared = made(toy_plan(rounds=1, simulation={"baselines": wanted}), tmp_path / "run")
    assert list(run_baselines(folder, prepared)) == names
    runs = [
        str(path.parent.relative_to(tmp_path / "run" / "baselines")) for path in (tmp_path / "run").rglob("baselines/**/run.json")
    ]
    assert sorted(runs) == [name for name in names if name != "pooled"]  # a head that is fitted needs no rounds


def by_itself(plan: Plan, site: Site) -> tuple[State, Metrics]:
    """The oracle: an organization that trains round after round and adds what it learned; no server, no grid, no strategy."""
    model = get_model(plan.model, plan.labels, None, plan.seed, "cpu", plan.task)
    model.load({})
    state = model.state(model.names("head"))
    for round in range(1, plan.rounds + 1):
        update = train_round(plan, site, round, state)
        state = {name: (tensor.double() + update.delta[name].double()).float() for name, tensor in state.items()}
    test = DatasetManifest.read(site.folder.parent / "run" / "test" / "data.json", plan.labels)
    return state, evaluate(model, state, test, plan.model.precision)


def test_alone_is_the_same_training_without_the_others(toy_plan: NewPlan, tmp_path: Path) -> None:
    folder, prepared = made(toy_plan(simulation={"baselines": ["alone"]}), tmp_path / "run")
    results = run_baselines(folder, prepared)
    for share in prepared.shares:
        make_site(tmp_path / share.name, share.name, folder.plan, [share], "cpu")
        state, metrics = by_itself(folder.plan, Site(tmp_path / share.name))
        assert same(RunFolder(folder.path / "baselines" / "alone" / share.name).load().state, state)
        assert results[f"alone/{share.name}"].metrics == metrics


def test_what_a_baseline_tells_is_what_it_is_judged_by(toy_plan: NewPlan, tmp_path: Path) -> None:
    folder, prepared = made(toy_plan(simulation={"baselines": ["alone"]}), tmp_path / "run")
    truth = DatasetManifest.read(folder.path / "test" / "data.json", prepared.plan.labels).truth
    for judged in run_baselines(folder, prepared).values():
        assert sum(t == n for t, n in zip(truth, judged.predicted, strict=True)) / len(truth) == judged.metrics.accuracy


def test_baseline_of_trained_encoder_runs_without_privacy_too(toy_plan: NewPlan, tmp_path: Path) -> None:
    own = {"learning_rate": 0.1, "batch_size": 0.5, "steps": 1}
    plan = toy_plan(train="lora", rounds=1, privacy={"epsilon": 8.0}, local=own, simulation={"baselines": ["alone"]})
    folder, prepared = made(plan, tmp_path / "run")
    names = [f"{kind}/org-{i}" for kind in ("alone", "alone-without-privacy") for i in (1, 2)]
    assert list(run_baselines(folder, prepared)) == names
    kinds = {name: RunFolder(folder.path / "baselines" / name).plan.privacy for name in names}
    assert [kinds[name] == "none" for name in names] == [False, False, True, True]


def test_pooled_baseline_trains_on_all_data_without_privacy(toy_plan: NewPlan, tmp_path: Path) -> None:
    own = {"optimizer": "adam", "learning_rate": 0.1, "batch_size": 64, "steps": 7, "momentum": 0.0}
    plan = toy_plan(privacy={"epsilon": 1.0}, simulation={"baselines": ["pooled"], "pooled": own})
    folder, prepared = made(plan, tmp_path / "run")
    results = run_baselines(folder, prepared)
    baseline = RunFolder(folder.path / "baselines" / "pooled")
    assert baseline.plan.privacy == "none"
    assert {(s.local.optimizer, s.local.batch_size, s.local.steps) for s in baseline.plan.stages} == {("adam", 64, 7)}
    site = Site(folder.path / "baselines" / "pooled" / "site")
    held = sorted(site.dataset(plan.labels or prepared.plan.labels).inputs())
    texts = prepared.records[None].inputs
    assert held == sorted(texts[i] for share in prepared.shares for i in share.rows)
    assert site.ledger().charges() == []  # nothing private, and entered as such
    assert {e.body["what"] for e in site.ledger().entries() if e.kind == "unprotected"} == {"training"}
    make_site(tmp_path / "all", "pooled", folder.plan, prepared.shares, "cpu")
    state, metrics = by_itself(baseline.plan, Site(tmp_path / "all"))
    assert same(baseline.load().state, state)
    assert {name: judged.metrics for name, judged in results.items()} == {"pooled": metrics}


def test_pooled_head_is_what_one_organization_with_all_records_fits(toy_plan: NewPlan, tmp_path: Path) -> None:
    """The oracle: a site that holds everybody's training records, and adapts a model that knows nothing."""
    folder, prepared = made(toy_plan(simulation={"baselines": ["pooled"]}), tmp_path / "run")
    plan = folder.plan
    pooled = run_baselines(folder, prepared)["pooled"]
    make_site(tmp_path / "all", "all", plan, prepared.shares, "cpu")
    held = Site(tmp_path / "all").dataset(plan.labels)
    test = DatasetManifest.read(folder.path / "test" / "data.json", plan.labels)
    model = get_model(plan.model, plan.labels, None, plan.seed, "cpu", plan.task)
    features = encoded_features(held, model, {}, plan.model.precision)
    own = build_own_records(features, held.targets, get_unit_numbers(held), len(plan.labels))
    head = adapt(model, own, load_base_head(model), plan.personalize, plan.seed).alone
    assert evaluate(model, head, test, plan.model.precision) == pooled.metrics
    assert sum(t == n for t, n in zip(test.truth, pooled.predicted, strict=True)) / len(test.truth) == pooled.metrics.accuracy


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"simulation": {"baselines": ["pooled"], "pooled": {"steps": 2}}}, 2**28),  # the plan says how
        ({"simulation": {"baselines": ["pooled"]}, "train": "lora"}, 2**28),  # not only a head is trained
        ({"simulation": {"baselines": ["pooled"]}}, 1000),  # memory would not hold the features
    ],
)
def test_pooled_is_a_run_where_no_head_can_stand_for_it(
    toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], most: int
) -> None:
    monkeypatch.setattr(fitted_heads, "_MOST_ENTRIES", most)
    folder, prepared = made(toy_plan(rounds=1, **changes), tmp_path / "run")
    assert list(run_baselines(folder, prepared)) == ["pooled"]
    assert RunFolder(folder.path / "baselines" / "pooled").finished


def test_a_pooled_head_that_cannot_be_fitted_is_told_and_costs_nothing_else(
    toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prepared = made(toy_plan(rounds=1, simulation={"baselines": ["pooled"]}), tmp_path / "run")
    encoded = fitted_heads.encoded_features
    monkeypatch.setattr(fitted_heads, "encoded_features", lambda *given: torch.full_like(encoded(*given), torch.nan))
    heard = list[str]()
    with observe_run(lambda event, fields: heard.append(event)):
        assert run_baselines(folder, prepared) == {}
    assert heard == ["baseline_started", "baseline_failed"]


def test_a_finished_baseline_is_not_trained_again(toy_plan: NewPlan, tmp_path: Path) -> None:
    folder, prepared = made(toy_plan(simulation={**COMPARED, "pooled": {"steps": 2}}), tmp_path / "run")
    first = run_baselines(folder, prepared)
    heard = list[str]()
    with observe_run(lambda event, fields: heard.append(event)):
        again = run_baselines(folder, prepared)
    assert again == first
    assert heard == ["baseline_finished"] * 3


def test_a_baseline_that_was_cut_short_goes_on_where_it_was(toy_plan: NewPlan, tmp_path: Path) -> None:
    folder, prepared = made(toy_plan(simulation={"baselines": ["alone"]}), tmp_path / "run")
    whole = run_baselines(folder, prepared)
    path = folder.path / "baselines" / "alone" / "org-2"
    state = RunFolder(path).load().state
    for round in (2, 3):
        (path / "checkpoints" / f"round-{round:05d}.safetensors").unlink()
    (path / "site" / "outbox" / "update.safetensors").unlink()
    trained: list[Any] = []
    with observe_run(lambda event, fields: trained.append((event, fields["baseline"]))):
        assert run_baselines(folder, prepared) == whole
    assert ("baseline_started", "alone/org-2") in trained
    assert ("baseline_started", "alone/org-1") not in trained
    assert same(RunFolder(path).load().state, state)


def test_baselines_leave_the_run_and_its_organizations_alone(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(privacy={"epsilon": 2.0}, local={"learning_rate": 1.0}, rounds=1, simulation=COMPARED)
    folder, prepared = made(plan, tmp_path / "run")
    sites = folder.path / "sites"
    before = {path: path.stat().st_mtime_ns for path in sites.rglob("*")}
    run_baselines(folder, prepared)
    assert {path: path.stat().st_mtime_ns for path in sites.rglob("*")} == before
    assert folder.load().round == 0
    for name in ("org-1", "org-2"):
        assert len(Site(folder.path / "baselines" / "alone" / name / "site").ledger().spent()) == 1


def test_the_shared_model_is_what_the_judge_says_afterwards(toy_plan: NewPlan, tmp_path: Path) -> None:
    """A baseline takes turns with the run on one resident model and must not leave anything of itself in it."""
    folder, prepared = made(toy_plan(rounds=1, simulation=COMPARED), tmp_path / "run")
    plan = folder.plan
    model = get_model(plan.model, plan.labels, None, plan.seed, "cpu", plan.task)
    model.load({})
    start = model.state(model.names("full"))
    run_baselines(folder, prepared)
    model.load({})
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state(model.names("full")).items())
