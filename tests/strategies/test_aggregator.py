from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cotune.errors import RunError
from cotune.strategies import (
    Aggregate,
    Delta,
    Needs,
    RoundContext,
    StrategyConfig,
    Sums,
    Update,
    Visibility,
    WeightedUpdate,
    weighted,
    weighted_mean,
)
from cotune.strategies.aggregator import Aggregator, build_aggregator
from cotune.strategies.registry import ComponentInfo, fusion, get_builtin_components, infer_component
from tests.support.failures import fails_with


def update(values: dict[str, float], examples: int = 10, noise: dict[str, float] | None = None) -> Update:
    return Update("a", 1, {n: torch.tensor([v]) for n, v in values.items()}, examples, 1, 1.0, noise_variance=noise)


def combine(
    fuse: Callable[..., Any],
    *updates: Update,
    weigh: Callable[..., Any] | None = None,
    context: RoundContext = RoundContext(),
    **given: Any,
) -> Aggregate:
    info = getattr(fuse, "component", None) or infer_component("fusion", "tried", fuse)
    weighting = infer_component("weighting", "tried", weigh) if weigh else get_builtin_components("weighting")["examples"]
    combination = Aggregator((weighting, {}), (info, given), context)
    for one in updates:
        combination.add(one)
    return combination.result()


MEAN = get_builtin_components("fusion")["mean"].build


def test_a_rule_of_one_sum_is_streamed_and_lets_go_of_each_delta() -> None:
    combination = build_aggregator(StrategyConfig(), RoundContext())
    for value, n in ((1.0, 10), (-3.0, 30)):
        one = update({"w": value}, n)
        seen = weakref.ref(one.delta["w"])
        combination.add(one)
        del one
        assert seen() is None
    fused = combination.result()
    assert isinstance(fused, Aggregate)
    assert (fused.delta["w"].item(), fused.participants) == (-2.0, 2)


def test_the_mean_squared_norm_is_weighted() -> None:
    """(10·‖(3, 4)‖² + 30·‖(0, 1)‖²) / 40 = 7."""
    fused = combine(MEAN, update({"a": 3.0, "b": 4.0}, 10), update({"a": 0.0, "b": 1.0}, 30))
    assert fused.mean_squared_norm == pytest.approx(7.0)


def test_weights_may_differ_between_parameters() -> None:
    fused = combine(
        MEAN,
        update({"a": 0.0, "b": 0.0}),
        update({"a": 4.0, "b": 4.0}),
        weigh=lambda updates: [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}],
    )
    assert (fused.delta["a"].item(), fused.delta["b"].item()) == (2.0, 3.0)


def test_held_updates_are_let_go_of_at_the_end() -> None:
    def first(updates: Sequence[WeightedUpdate]) -> Delta:
        return {"a": torch.ones(1)}

    combination = Aggregator(
        (get_builtin_components("weighting")["uniform"], {}), (infer_component("fusion", "f", first), {}), RoundContext()
    )
    one = update({"a": 1.0})
    seen = weakref.ref(one.delta["a"])
    combination.add(one)
    del one
    assert seen() is not None
    combination.result()
    assert seen() is None


def test_a_delta_of_what_the_model_has_not_is_refused() -> None:
    def foreign(updates: Sequence[WeightedUpdate]) -> Delta:
        return {"b": torch.ones(1)}

    context = RoundContext(state={"a": torch.zeros(1)})
    combination = Aggregator(
        (get_builtin_components("weighting")["uniform"], {}), (infer_component("fusion", "f", foreign), {}), context
    )
    combination.add(update({"a": 1.0}))
    with fails_with("run.invalid_aggregate"):
        combination.result()


def test_a_plan_chooses() -> None:
    aware = build_aggregator(StrategyConfig.model_validate({"weighting": "noise_aware"}), RoundContext())
    aware.add(update({"w": 2.0}, 1, {"w": 1.0}))
    aware.add(update({"w": 2.0}, 1000, {"w": 9.0}))
    fused = aware.result()
    assert isinstance(fused, Aggregate)
    assert fused.delta["w"].item() == pytest.approx(2.0)


@fusion("spread", cite="a test", needs=Needs(visibility=Visibility.SUM_2PASS))
def spread() -> Sums:
    """Σ(Δ_k − mean)², which takes two passes."""
    mean = weighted_mean((yield weighted))
    return (yield lambda u: {name: (d - mean[name]).pow(2) for name, d in u.delta.items()})


def test_several_passes_see_every_update_again() -> None:
    fused = combine(spread, update({"w": 1.0}), update({"w": 3.0}), update({"w": 8.0}))
    assert fused.delta["w"].item() == pytest.approx(9.0 + 1.0 + 16.0)


def test_a_second_pass_must_be_declared() -> None:
    info = ComponentInfo("fusion", "spread", spread, "a test", Needs())
    combination = Aggregator((get_builtin_components("weighting")["uniform"], {}), (info, {}), RoundContext())
    combination.add(update({"w": 1.0}))
    with fails_with("run.undeclared_pass", "spread"):
        combination.result()


def test_the_round_of_nobody_is_nothing() -> None:
    assert combine(MEAN) == Aggregate({}, 0)
    assert combine(spread) == Aggregate({}, 0)


def test_what_a_fusion_remembers_comes_back() -> None:
    def counting(updates: Sequence[WeightedUpdate], context: RoundContext) -> Aggregate:
        count = context.memory.get("rounds", torch.zeros(())) + 1
        return Aggregate({"w": count.reshape(1)}, memory={"rounds": count})

    first = combine(counting, update({"w": 0.0}))
    again = combine(counting, update({"w": 0.0}), context=RoundContext(memory=first.memory))
    assert again.delta["w"].item() == 2.0


@pytest.mark.parametrize(
    ("fuse", "message"),
    [
        (lambda updates: {"w": torch.tensor([float("nan")])}, "gave values for w that are not finite"),
        (lambda updates: {"w": torch.zeros(2)}, r"gave w \(2,\): expected \(1,\), as in the model"),
    ],
)
def test_what_is_no_delta_of_the_model_is_refused(fuse: Callable[[Any], Delta], message: str) -> None:
    with pytest.raises(RunError, match=message):
        combine(fuse, update({"w": 1.0}), context=RoundContext(state={"w": torch.zeros(1)}))


def test_values_that_are_not_finite_are_refused() -> None:
    with fails_with("run.update_not_finite"):
        combine(MEAN, update({"w": float("inf")}))


def test_too_few_updates_are_refused() -> None:
    @fusion("pairs", cite="a test", min_updates=lambda many: many)
    def pairs(updates: Sequence[WeightedUpdate], many: int = 2) -> Delta:
        return dict(updates[0].delta)

    with fails_with("run.too_few_updates", "pairs", "3", "1"):
        combine(pairs, update({"w": 1.0}), many=3)


def test_factors_of_a_smaller_rank_count_only_where_they_are() -> None:
    """Rank 2 and rank 1 of a factor B (2, r): the second column is that of the first organization alone."""

    def factor(values: list[list[float]], n: int) -> Update:
        return Update("a", 1, {"b": torch.tensor(values)}, n, 1)

    state: dict[str, Tensor] = {"b": torch.zeros(2, 2)}
    fused = combine(MEAN, factor([[1.0, 2.0], [3.0, 4.0]], 10), factor([[5.0], [7.0]], 30), context=RoundContext(state=state))
    assert fused.delta["b"].tolist() == [[4.0, 2.0], [6.0, 4.0]]


def test_a_late_update_counts_by_the_root_of_its_staleness() -> None:
    """By hand: weights 10, 30 / √4 = 15 and 20 / √2; a weight for each parameter is scaled alike."""
    for weigh in (None, lambda update: {"w": float(update.examples)}):
        weighting = infer_component("weighting", "tried", weigh) if weigh else get_builtin_components("weighting")["examples"]
        combination = Aggregator((weighting, {}), (get_builtin_components("fusion")["mean"], {}), RoundContext())
        combination.add(update({"w": 1.0}, 10))
        combination.add(update({"w": -3.0}, 30), staleness=3)
        combination.add(update({"w": 2.0}, 20), staleness=1)
        last = 20 / 2**0.5
        expected = (10 * 1 - 15 * 3 + last * 2) / (25 + last)
        assert float(combination.result().delta["w"]) == pytest.approx(expected)


def test_a_rule_that_compares_updates_takes_none_that_are_late() -> None:
    combination = build_aggregator(StrategyConfig.model_validate({"fusion": "median"}), RoundContext())
    with fails_with("run.update_late"):
        combination.add(update({"w": 1.0}), staleness=1)
