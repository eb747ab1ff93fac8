from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.adapted_layers import HEAD, A, B, adapter, close, deltas_of, fused, products, state_of


def best(product: Tensor, rank: int) -> Tensor:
    u, s, vh = np.linalg.svd(product.numpy())
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 3, 2), (1, 1, 1)])
@pytest.mark.parametrize("names", [(A, B, HEAD), (B, HEAD)])
def test_new_factors_best_approximate_the_mean_of_products(ranks: tuple[int, ...], names: tuple[str, ...]) -> None:
    state = state_of(3)
    counts = (1, 2, 5)
    deltas = deltas_of(state, ranks, names=names)
    new = fused("flexlora", state, deltas, counts, adapter(3))
    close(new[B] @ new[A], best(products(state, deltas, counts), 3), 1e-10)
    close(new[A] @ new[A].T, torch.eye(3), 1e-10)
    close(new[HEAD], fused("mean", state, deltas, counts)[HEAD])


def test_small_ranks_alone_leave_directions_for_others() -> None:
    """Otherwise rows of A and columns of B would be 0 together, and never get a gradient again."""
    state = state_of(3)
    new = fused("flexlora", state, deltas_of(state, (1,)), (1,), adapter(3))
    close(new[A].norm(dim=1), torch.ones(3))
    close(new[B][:, 1:], torch.zeros(5, 2))


def test_by_hand_blocks_weigh_a_slice_among_those_that_hold_it() -> None:
    """Two organizations agree on slice 1; one alone holds slice 2: it counts in full instead of half."""
    eye = torch.eye(2)
    state = {A: torch.zeros(2, 2), B: torch.zeros(2, 2)}
    small = {A: eye[:1], B: eye[:, :1] * 4}
    whole = {A: eye, B: eye * 4}
    for blocks, kept in ((False, 2.0), (True, 4.0)):
        new = fused("flexlora", state, [small, whole], (1, 1), adapter(2), blocks=blocks)
        close(new[B] @ new[A], torch.diag(torch.tensor([4.0, kept])), 1e-12)


@pytest.mark.parametrize(("blocks", "kept"), [(False, 0.5**6), (True, 1.0)])
def test_without_blocks_what_few_hold_fades_away(blocks: bool, kept: float) -> None:
    """Six rounds in which nobody learns anything: rank collapse (Wu et al., 2026)."""
    state = {A: torch.eye(2), B: torch.diag(torch.tensor([4.0, 1.0]))}
    for _ in range(6):
        nothing = deltas_of(state, (1, 2), names=(A, B))
        still = [{n: torch.zeros_like(t) for n, t in delta.items()} for delta in nothing]
        state = {n: t.float() for n, t in fused("flexlora", state, still, (1, 1), adapter(2), blocks=blocks).items()}
    singular = torch.linalg.svdvals(state[B] @ state[A])
    close(singular, torch.tensor([4.0, kept]), 1e-5)


def test_blocks_change_nothing_where_all_ranks_are_the_same() -> None:
    state = state_of(3)
    counts = (1, 2, 5)
    deltas = deltas_of(state, (3, 3, 3))
    plain, blocks = (fused("flexlora", state, deltas, counts, adapter(3), blocks=b) for b in (False, True))
    for name in (A, B, HEAD):
        close(blocks[name], plain[name])
