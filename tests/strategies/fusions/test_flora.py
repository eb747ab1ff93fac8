from __future__ import annotations

import pytest
import torch

from cotune.models.adapters.adapter import init_lora_a, parameter_seed
from tests.support.adapted_layers import HEAD, A, B, W, adapter, close, deltas_of, fused, products, state_of


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 3, 2), (1, 1, 2)])
@pytest.mark.parametrize("names", [(A, B, HEAD), (B, HEAD)])
@pytest.mark.parametrize("transposed", [False, True])
def test_all_products_go_into_the_weight(ranks: tuple[int, ...], names: tuple[str, ...], transposed: bool) -> None:
    state = state_of(3, transposed=transposed)
    counts = (1, 2, 5)
    deltas = deltas_of(state, ranks, names=names)
    new = fused("flora", state, deltas, counts, adapter(3, scale=0.5, transposed=transposed))
    before, after = (s[W].double().T if transposed else s[W].double() for s in (state, new))
    close(after, before + 0.5 * products(state, deltas, counts), 1e-12)
    assert not bool(new[B].any())
    close(new[HEAD], fused("mean", state, deltas, counts)[HEAD])


def test_by_hand_at_rank_one() -> None:
    """(B, A) = (1, 1) and (3, 3) with weights ¼ and ¾, s = 2: W += 2·(¼·1 + ¾·9)."""
    state = {A: torch.zeros(1, 1), B: torch.zeros(1, 1), W: torch.full((1, 1), 7.0)}
    deltas = [{A: torch.full((1, 1), x), B: torch.full((1, 1), x)} for x in (1.0, 3.0)]
    assert float(fused("flora", state, deltas, (1, 3), adapter(1, scale=2.0))[W]) == 21.0


def test_a_is_redrawn_in_every_round_and_alike_for_everybody() -> None:
    state = state_of(3)
    deltas = deltas_of(state, (3,))
    first, again, later = (fused("flora", state, deltas, (1,), adapter(3), round=round)[A] for round in (1, 1, 2))
    assert torch.equal(first, again)
    close(first, init_lora_a((3, 7), parameter_seed(3, f"{A}/1")))
    assert bool((first != later).all())
    assert 0 < float(first.abs().max()) <= 7**-0.5  # as peft draws: uniform up to 1/√d_in
