"""Whole runs with the rules of adapters: what the organizations receive and send, and the model that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cotune.client.site import Site
from cotune.errors import PlanError
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.forecast.forecast import forecast
from cotune.simulations.run import simulate
from tests.support.failures import fails_with
from tests.support.simulations import UNADAPTED, NewPlan, final_model, told

LORA: dict[str, Any] = {"train": "lora", "local": {"learning_rate": 1.0, "momentum": 0.0, "steps": 3}}


def sent_last(run: Path, organization: str) -> dict[str, Tensor]:
    """The delta in an organization's outbox."""
    content = load_file(run / "sites" / organization / "outbox" / "update.safetensors")
    return {name.removeprefix("delta/"): content[name] for name in sorted(content)}


def merged(plan: Plan, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + s·B·A of every adapted weight, from a state."""
    model = get_plan_model(plan, "cpu")
    model.load(state)
    own = {name: p.detach().double() for name, p in model.parameters()}
    adapters = model.adapters()
    assert adapters
    products = {a.weight: a.scale * own[a.b] @ own[a.a] for a in adapters}
    return {a.weight: own[a.weight] + (products[a.weight].T if a.transposed else products[a.weight]) for a in adapters}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        *((recipe, "shallow-bert") for recipe in ("ffa_lora", "fedsvd", "fedex", "flexlora")),
        *(pytest.param(recipe, "shallow-bert", marks=pytest.mark.long) for recipe in ("fedit", "rolora", "flora", "hetlora")),
        ("flora", "gpt2"),  # whose weights are kept transposed
        pytest.param("fedex", "gpt2", marks=pytest.mark.long),
    ],
)
def test_every_recipe_trains_a_model_that_can_be_handed_out(toy_plan: NewPlan, tmp_path: Path, recipe: str, kind: str) -> None:
    plan = toy_plan(kind, strategy=recipe, **LORA, lora={"rank": 2}, simulation={"baselines": []})
    run = simulate(plan, tmp_path / "run", device="cpu").folder
    folder = RunFolder(run)
    handed_out = final_model(run)
    adapted = merged(folder.plan, folder.load().state)
    base = merged(folder.plan, {})
    for name, weight in adapted.items():
        torch.testing.assert_close(handed_out[name].double(), weight, atol=1e-5, rtol=1e-5)
        assert not torch.equal(weight, base[name])
    assert all(entry["dropped"] == [] for entry in folder.load().history)


@pytest.mark.parametrize(
    ("recipe", "rounds", "sent"),
    [("ffa_lora", 1, "B"), ("fedsvd", 2, "B"), ("rolora", 1, "B"), ("rolora", 2, "A"), ("fedit", 1, "AB"), ("flora", 2, "AB")],
)
def test_what_travels_up_is_what_is_trained(toy_plan: NewPlan, tmp_path: Path, recipe: str, rounds: int, sent: str) -> None:
    plan = toy_plan(strategy=recipe, rounds=rounds, **LORA, lora={"rank": 2}, simulation={"baselines": []})
    run = simulate(plan, tmp_path / "run", device="cpu").folder
    names = sent_last(run, "org-1")
    assert {name.split(".lora_")[1][0] for name in names if ".lora_" in name} == set(sent)
    assert [name for name in names if ".lora_" not in name] == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize("recipe", ["ffa_lora", "fedsvd", "flora", "fedsa"])
def test_what_travels_is_foreseen(toy_plan: NewPlan, tmp_path: Path, recipe: str) -> None:
    plan = toy_plan(strategy=recipe, rounds=1, **LORA, lora={"rank": 2}, simulation={"baselines": []})
    [stage] = forecast(plan, "cpu").stages
    [entry] = RunFolder(simulate(plan, tmp_path / "run", device="cpu").folder).load().history
    assert stage.bytes_up == entry["bytes_up"]
    beside = entry["bytes_down"] - stage.bytes_down  # names of folders
    assert 0 <= beside < 1000


def test_fedsvd_hands_out_orthonormal_rows(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Under record-level privacy: A changes from round to round, though nobody trains it."""
    plan = toy_plan(strategy="fedsvd", **LORA, lora={"rank": 2}, privacy={"epsilon": 8.0}, simulation={"baselines": []})
    folder = RunFolder(simulate(plan, tmp_path / "run", device="cpu").folder)
    state = folder.load().state
    model = get_plan_model(folder.plan, "cpu")
    model.load({})
    for adapter in model.adapters():
        torch.testing.assert_close(state[adapter.a] @ state[adapter.a].T, torch.eye(2), atol=1e-5, rtol=0)
        assert not torch.equal(state[adapter.a], model.state([adapter.a])[adapter.a])


# --- organizations with smaller ranks


@pytest.mark.parametrize(
    ("recipe", "privacy"),
    [
        pytest.param("ffa_lora", {"epsilon": 8.0}, marks=pytest.mark.long),  # in short: test_personal.py
        ("flora", "none"),
        pytest.param("flexlora", "none", marks=pytest.mark.long),
        pytest.param("hetlora", "none", marks=pytest.mark.long),
    ],
)
def test_every_organization_trains_its_own_rank(toy_plan: NewPlan, tmp_path: Path, recipe: str, privacy: Any) -> None:
    ranks = [2, 8]
    simulation = {"clients": 2, "ranks": ranks, "baselines": ["alone"]}
    plan = toy_plan(
        strategy=recipe, rounds=2, **LORA, lora={"rank": 8}, privacy=privacy, simulation=simulation, personalize=UNADAPTED
    )
    result = simulate(plan, tmp_path / "run", device="cpu")
    folder = RunFolder(result.folder)
    assert [entry["participants"] for entry in folder.load().history] == [["org-1", "org-2"]] * 2
    assert not told(result.folder, "adapted")  # nor is a head fitted: this plan wants no adapted model
    alone = [f"baselines/alone/org-{number}/site" for number in (1, 2)]
    for rank, site in zip(ranks * 2, [*(f"sites/org-{number}" for number in (1, 2)), *alone], strict=True):
        delta = load_file(result.folder / site / "outbox" / "update.safetensors")
        came = {t.shape[1] if ".lora_B." in n else t.shape[0] for n, t in delta.items() if ".lora_" in n}
        assert came == {rank}
    model = get_plan_model(folder.plan, "cpu")
    assert {folder.load().state[adapter.b].shape[1] for adapter in model.adapters()} == {8}


def test_a_frozen_a_makes_the_mean_exact_slice_by_slice(toy_plan: NewPlan, tmp_path: Path) -> None:
    """One round from B = 0: each column is the weighted mean over those that hold it, so that it is of the products too."""
    plan = toy_plan(rounds=1, **LORA, lora={"rank": 4}, simulation={"clients": 2, "ranks": [2, 4], "baselines": []})
    folder = RunFolder(simulate(plan, tmp_path / "run", device="cpu").folder)
    small = sent_last(folder.path, "org-1")
    whole = sent_last(folder.path, "org-2")
    counts = [Site(folder.path / "sites" / f"org-{i}").dataset(folder.plan.labels).label_counts().values() for i in (1, 2)]
    share = sum(counts[0]) / (sum(counts[0]) + sum(counts[1]))
    state = folder.load().state
    for adapter in get_plan_model(folder.plan, "cpu").adapters():
        shared = share * small[adapter.b] + (1 - share) * whole[adapter.b][:, :2]
        torch.testing.assert_close(state[adapter.b], torch.cat([shared, whole[adapter.b][:, 2:]], dim=1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"simulation": {"ranks": [2, 9]}}, r"simulation\.ranks = \[2, 9\]: expected each from 1 to lora\.rank = 8"),
        ({"simulation": {"ranks": [0, 8]}}, r"simulation\.ranks = \[0, 8\]: expected each from 1"),
        ({"simulation": {"ranks": [2, 8]}, "train": "head"}, r"is for adapters, and no stage trains any: expected train = lora"),
        ({"simulation": {"ranks": [2, 8]}, "strategy": "fedsvd"}, r'the fusion "fedsvd" cannot fuse adapters of different ranks'),
        ({"lora": {"rank": 8, "smaller_ranks": True}, "strategy": "fedex"}, r'"fedex" cannot fuse adapters of different ranks'),
        ({"simulation": {"ranks": [2, 8]}, "strategy": {"weighting": "noise_aware"}}, r"noise_aware.* is about whole adapters"),
        (
            {"simulation": {"ranks": [2, 8]}, "strategy": {"weighting": "uniform"}, "client_privacy": {"epsilon": 8.0}},
            r"cannot take smaller ranks with client_privacy",
        ),
    ],
)
def test_plans_that_cannot_have_smaller_ranks(toy_plan: NewPlan, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        toy_plan(**{"train": "lora", "lora": {"rank": 8}, **changes})


def test_the_same_rank_for_all_is_no_matter(toy_plan: NewPlan) -> None:
    plan = toy_plan(strategy="fedsvd", train="lora", lora={"rank": 8}, simulation={"ranks": [8, 8]})
    assert not plan.mixed_ranks


def test_every_organization_needs_a_rank_of_its_own(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(**LORA, lora={"rank": 8}, simulation={"clients": 3, "ranks": [2]})
    with fails_with("plan.values_per_organization", "1", "simulation.ranks", "3"):
        simulate(plan, tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"fusion": "fedsvd"}, None),
        ({"fusion": "fedit"}, r"is for lora\.factors = ab, and the plan has b"),
        ({"fusion": "fedsvd", "server_optimizer": {"name": "sgd", "lr": 0.5}}, "gives a new model rather than a direction"),
        ({"recipe": "fedit"}, r'is for lora\.factors = "ab", and the plan has "b": leave it out'),
    ],
)
def test_rules_of_adapters_ask_for_their_factors(toy_plan: NewPlan, strategy: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert toy_plan(train="lora", lora={"factors": "b"}, strategy=strategy).strategy.fusion.name == "fedsvd"
        return
    with pytest.raises(PlanError, match=said):
        toy_plan(train="lora", lora={"factors": "b"}, strategy=strategy)


@pytest.mark.parametrize(
    ("recipe", "fusion", "factors"), [("ffa_lora", "mean", "b"), ("rolora", "mean", "alternate"), ("fedex", "fedex", "ab")]
)
def test_recipes_say_which_factors_are_trained(toy_plan: NewPlan, recipe: str, fusion: str, factors: str) -> None:
    plan = toy_plan(train="lora", strategy=recipe)
    assert (plan.strategy.fusion.name, plan.lora.factors) == (fusion, factors)


@pytest.mark.parametrize("recipe", ["ffa_lora", "rolora", "fedsa", "fedex"])
@pytest.mark.parametrize("train", ["head", "full", [{"mode": "head", "rounds": 1}]])
def test_a_recipe_of_adapters_is_refused_where_none_are_trained(toy_plan: NewPlan, recipe: str, train: Any) -> None:
    with pytest.raises(PlanError, match=rf'the strategy "{recipe}" is for adapters, and no stage of the plan trains any'):
        toy_plan(train=train, strategy=recipe)
