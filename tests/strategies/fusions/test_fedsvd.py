from __future__ import annotations

import torch

from tests.support.adapted_layers import HEAD, A, B, W, adapter, close, deltas_of, fused, products, state_of


def test_the_product_is_that_of_the_mean_of_b_under_a() -> None:
    state = state_of(3)
    counts = (1, 2, 5)
    deltas = deltas_of(state, (3, 3, 3), names=(B, HEAD))
    new = fused("fedsvd", state, deltas, counts, adapter(3))
    close(new[B] @ new[A], products(state, deltas, counts), 1e-12)
    mean = sum(n / 8 * d[B].double() for n, d in zip(counts, deltas, strict=True))
    close(new[B] @ new[A], (state[B].double() + mean) @ state[A].double(), 1e-12)
    close(new[A] @ new[A].T, torch.eye(3), 1e-12)
    close(new[HEAD], state[HEAD].double() + sum(n / 8 * d[HEAD].double() for n, d in zip(counts, deltas, strict=True)))
    assert torch.equal(new[W], state[W].double())


def test_by_hand_at_rank_one() -> None:
    """B̄ = (3 + 1)/2 = 2, A = (3, 4): the product is (6, 8) = 10·(0.6, 0.8)."""
    state = {A: torch.tensor([[3.0, 4.0]]), B: torch.tensor([[1.0]])}
    new = fused("fedsvd", state, [{B: torch.tensor([[2.0]])}, {B: torch.tensor([[0.0]])}], (1, 1), adapter(1))
    close(new[B], torch.tensor([[10.0]]), 1e-12)
    close(new[A], torch.tensor([[0.6, 0.8]]), 1e-6)


def test_columns_of_b_are_in_order_of_what_they_do() -> None:
    state = state_of(3)
    new = fused("fedsvd", state, deltas_of(state, (3,), names=(B,)), (1,), adapter(3))
    sizes = new[B].norm(dim=0)
    assert bool((sizes.diff() <= 0).all())
    gram = new[B].T @ new[B]
    close(gram, torch.diag(sizes.pow(2)), 1e-10)


def test_in_a_stage_without_adapters_it_is_the_mean() -> None:
    state = state_of(2)
    new = fused("fedsvd", state, [{HEAD: torch.ones(2, 3)}, {HEAD: torch.zeros(2, 3)}], (1, 3))
    close(new[HEAD], state[HEAD].double() + 0.25)
    assert torch.equal(new[A], state[A].double())
