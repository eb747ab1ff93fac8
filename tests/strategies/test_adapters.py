from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.strategies.client_terms.base import ClientTerm
from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.config import Component, StrategyConfig
from cotune.strategies.fusions.adapters.low_rank import (
    average_deltas,
    pad_to_shape,
    product_norm,
    stack_factors,
    truncate_to_rank,
)
from cotune.strategies.registry import ComponentInfo, Needs
from cotune.strategies.types import Update, WeightedUpdate
from tests.support.adapted_layers import A, B, close

sizes = st.integers(1, 6)


@given(rows=sizes, between=sizes, columns=sizes, rank=sizes, seed=st.integers(0, 100))
@settings(deadline=None)
def test_the_best_product_of_a_rank_is_that_of_a_dense_svd(rows: int, between: int, columns: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(rows, between))
    right = rng.normal(size=(between, columns))
    b, a = truncate_to_rank(torch.from_numpy(left), torch.from_numpy(right), rank)
    assert (b.shape, a.shape) == ((rows, rank), (rank, columns))
    u, s, vh = np.linalg.svd(left @ right)
    kept = min(rank, len(s))
    np.testing.assert_allclose((b @ a).numpy(), (u[:, :kept] * s[:kept]) @ vh[:kept], atol=1e-10)
    rows_of_a = min(rank, rows, between, columns)
    np.testing.assert_allclose((a @ a.T).numpy(), np.diag([1.0] * rows_of_a + [0.0] * (rank - rows_of_a)), atol=1e-10)


def test_signs_do_not_depend_on_how_the_product_is_written() -> None:
    left = torch.randn(5, 3, dtype=torch.float64)
    right = torch.randn(3, 4, dtype=torch.float64)
    b, a = truncate_to_rank(left, right, 3)
    turned_b, turned_a = truncate_to_rank(-2 * left, -right / 2, 3)
    close(turned_b, b)
    close(turned_a, a)
    assert bool((a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all())


def test_nothing_learnt_keeps_directions_to_learn_in() -> None:
    """B = 0, as in the first round: A has orthonormal rows all the same."""
    b, a = truncate_to_rank(torch.zeros(5, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64), 2)
    assert not bool(b.any())
    close(a @ a.T, torch.eye(2))


def test_the_norm_of_a_product_without_the_product() -> None:
    b = torch.randn(5, 2, dtype=torch.float64)
    a = torch.randn(2, 4, dtype=torch.float64)
    assert abs(product_norm(b, a) - float((b @ a).norm())) < 1e-12
    assert product_norm(torch.zeros(5, 2), torch.ones(2, 4)) == 0.0


def test_a_stack_of_hand_made_factors() -> None:
    one = (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
    two = (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    left, right = stack_factors([one, two], [0.5, torch.tensor([1.0, 0.0])])
    assert left.tolist() == [[0.5, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert right.tolist() == [[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    assert (left @ right).tolist() == [[6.5, 8.0], [3.0, 4.0]]  # ½·[[3, 4], [6, 8]] + [[5, 6], [0, 0]]


def test_padding() -> None:
    assert pad_to_shape(torch.tensor([[1.0, 2.0]]), (2, 3)).tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_mean_of_slices_is_over_those_that_hold_them() -> None:
    """Rank 1 with weight 1, rank 2 with weight 3, whichever comes first."""
    state = {A: torch.zeros(2, 2), B: torch.zeros(1, 2)}
    small = Update("s", 1, {A: torch.tensor([[4.0, 8.0]]), B: torch.tensor([[4.0]])}, examples=1, steps=1)
    whole = Update("w", 1, {A: torch.tensor([[0.0, 4.0], [5.0, 6.0]]), B: torch.tensor([[8.0, 7.0]])}, examples=3, steps=1)
    weighed = [WeightedUpdate(small, 1.0, state), WeightedUpdate(whole, 3.0, state)]
    for order in (weighed, weighed[::-1]):
        mean = average_deltas(order)
        assert mean[A].tolist() == [[1.0, 5.0], [5.0, 6.0]]
        assert mean[B].tolist() == [[7.0, 7.0]]


@pytest.mark.parametrize(
    ("facts", "fusion", "said"),
    [
        (
            {},
            "flora",
            'the client term "mine.py:term" counts on the mean of what the organizations trained, and the fusion "flora"',
        ),
        ({}, "fedit", None),
        ({"mixed_ranks": True}, "mean", "is about whole adapters, and the plan has smaller ranks"),
        ({"personal": True}, "mean", "is about whole models, and the plan leaves a part of them at home"),
    ],
)
@pytest.mark.parametrize("needs", [Needs(client_state=True), Needs(receives=True), Needs()])
def test_personal_tensors_are_whole_adapters(facts: dict[str, Any], fusion: str, said: str | None, needs: Needs) -> None:
    term = ComponentInfo("client_term", "term", ClientTerm, "", needs)
    strategy = StrategyConfig.model_validate({"fusion": fusion}).model_copy(
        update={"client_term": Component(name="mine.py:term")}
    )
    found = find_problem(strategy, PlanFacts(modes=("lora",), factors="ab", **facts), {"client_term": term})
    if said is None or needs == Needs():
        assert found is None
    else:
        assert said in (found or "")
