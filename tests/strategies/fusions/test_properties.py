"""What holds for every fusion, as far as it says so of itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.config import RECIPES, StrategyConfig, expand
from cotune.strategies.registry import ComponentInfo, Visibility, get_builtin_components
from cotune.strategies.types import LocalSteps, RoundContext

COUNT = 11  # enough for every rule's defaults
NAMES = [
    name
    for name, info in get_builtin_components("fusion").items()
    if not info.needs.adapters and not info.needs.public_inputs and set(info.needs.sends) <= {"loss"}
]


def judge(delta: Any) -> float:
    return -float(delta["a"].pow(2).sum() + delta["b"].abs().sum())


CONTEXT = RoundContext(round=3, seed=5, local=LocalSteps(steps=3), score=judge)


def deltas_of(rng: np.random.Generator, count: int = COUNT) -> list[dict[str, np.ndarray]]:
    return [{"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)} for _ in range(count)]


def changes(count: int = COUNT) -> list[dict[str, Any]]:
    return [{"organization": f"org-{k}", "steps": 1 + k % 3, "disclosures": {"loss": 0.5 + k / 10}} for k in range(count)]


def weights_of(info: ComponentInfo, rng: np.random.Generator) -> list[float]:
    return list(rng.uniform(1, 3, size=COUNT)) if info.needs.weights else [1.0] * COUNT


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_updates_does_not_count(fuse: Any, rng: np.random.Generator, name: str) -> None:
    deltas = deltas_of(rng)
    weights = weights_of(get_builtin_components("fusion")[name], rng)
    order = rng.permutation(COUNT)
    found = fuse(name, deltas, weights, context=CONTEXT, changes=changes())
    moved = [[these[k] for k in order] for these in (deltas, weights, changes())]
    again = fuse(name, moved[0], moved[1], context=CONTEXT, changes=moved[2])
    for key in "ab":
        assert again[key] == pytest.approx(found[key], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if get_builtin_components("fusion")[name].homogeneous])
@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_who_says_so_scales(fuse: Any, rng: np.random.Generator, name: str, factor: float) -> None:
    deltas = deltas_of(rng)
    weights = weights_of(get_builtin_components("fusion")[name], rng)
    found = fuse(name, deltas, weights, context=CONTEXT, changes=changes())
    larger = [{key: factor * values for key, values in delta.items()} for delta in deltas]
    scaled = fuse(name, larger, weights, context=CONTEXT, changes=changes())
    for key in "ab":
        assert scaled[key] == pytest.approx(factor * found[key], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if get_builtin_components("fusion")[name].idempotent])
def test_who_says_so_keeps_what_all_agree_on(fuse: Any, rng: np.random.Generator, name: str) -> None:
    one = deltas_of(rng, 1)[0]
    found = fuse(name, [one] * COUNT, weights_of(get_builtin_components("fusion")[name], rng), context=CONTEXT, changes=changes())
    for key in "ab":
        assert found[key] == pytest.approx(one[key], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_only_who_uses_weights_depends_on_them(fuse: Any, rng: np.random.Generator, name: str) -> None:
    deltas = deltas_of(rng)
    weights = list(rng.uniform(1, 9, size=COUNT))
    plain, weighed = (fuse(name, deltas, w, context=CONTEXT, changes=changes()) for w in (None, weights))
    same = all(np.allclose(plain[key], weighed[key], rtol=1e-9) for key in "ab")
    assert same != get_builtin_components("fusion")[name].needs.weights


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "mean"])
def test_moving_all_updates_moves_the_result(fuse: Any, rng: np.random.Generator, name: str) -> None:
    deltas = deltas_of(rng)
    shift = deltas_of(rng, 1)[0]
    found = fuse(name, deltas)
    moved = fuse(name, [{key: delta[key] + shift[key] for key in delta} for delta in deltas])
    for key in "ab":
        assert moved[key] == pytest.approx(found[key] + shift[key], abs=1e-9)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "norm_bound"])
def test_a_robust_rule_stays_near_the_honest_ones(fuse: Any, rng: np.random.Generator, name: str) -> None:
    """One of eleven says 10⁶ everywhere: the mean is 10⁵ away. Each pass of the geometric median brings it back to a tenth."""
    deltas = deltas_of(rng)
    honest = {key: np.mean([delta[key] for delta in deltas[1:]], axis=0) for key in "ab"}
    hostile = {key: np.full_like(values, 1e6) for key, values in deltas[0].items()}
    found = fuse(name, [hostile, *deltas[1:]], **({"passes": 12} if name == "geometric_median" else {}))
    assert all(np.abs(found[key] - honest[key]).max() < 4 for key in "ab")


@pytest.mark.parametrize("name", NAMES)
def test_float32_updates_are_fused_in_float64(play: Any, rng: np.random.Generator, name: str) -> None:
    small = [{key: torch.from_numpy(values).float() for key, values in delta.items()} for delta in deltas_of(rng)]
    found = play(
        name, deltas_of(rng), context=CONTEXT, changes=[{**c, "delta": d} for c, d in zip(changes(), small, strict=True)]
    )
    assert {tensor.dtype for tensor in found.delta.values()} == {torch.float64}


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_says_where_it_comes_from(name: str) -> None:
    info = get_builtin_components("fusion")[name]
    assert "https://" in info.cite
    assert info.summary.endswith((".", ":"))


@pytest.mark.parametrize("recipe", [r for r, parts in RECIPES.items() if parts.get("fusion", "mean") in NAMES])
def test_each_flower_recipe_is_a_runnable_strategy(recipe: str) -> None:
    strategy = StrategyConfig.model_validate(expand({"strategy": recipe, "train": "lora"})["strategy"])
    facts = PlanFacts(organizations=COUNT, server_data=True)
    assert find_problem(strategy, facts) is None


@pytest.mark.parametrize(
    "name", [name for name in NAMES if get_builtin_components("fusion")[name].needs.visibility != Visibility.SUM]
)
def test_rule_beyond_a_sum_is_refused_if_server_sees_sums_only(name: str) -> None:
    strategy = StrategyConfig.model_validate({"fusion": name})
    assert "server.visibility allows one sum" in str(find_problem(strategy, PlanFacts(sums_only=True, server_data=True)))
