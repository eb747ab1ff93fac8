from __future__ import annotations

import pytest
import torch

from tests.support.adapted_layers import HEAD, A, B, W, adapter, close, deltas_of, fused, products, state_of


@pytest.mark.parametrize("transposed", [False, True])
def test_the_adapted_weight_is_that_of_the_mean_of_the_products(transposed: bool) -> None:
    state = state_of(3, transposed=transposed)
    counts = (1, 2, 5)
    layer = adapter(3, scale=0.5, transposed=transposed)
    deltas = deltas_of(state, (3, 3, 3))
    new = fused("fedex", state, deltas, counts, layer)
    before, after = (s[W].double().T if transposed else s[W].double() for s in (state, new))
    close(after + 0.5 * new[B] @ new[A], before + 0.5 * products(state, deltas, counts), 1e-12)
    for name in (A, B, HEAD):  # these are FedIT's
        close(new[name], fused("fedit", state, deltas, counts, layer)[name])


def test_by_hand_at_rank_one() -> None:
    """(B, A) = (1, 1) and (3, 3), s = ½: W += ½(5 − 2·2)."""
    state = {A: torch.zeros(1, 1), B: torch.zeros(1, 1), W: torch.full((1, 1), 7.0)}
    deltas = [{A: torch.full((1, 1), x), B: torch.full((1, 1), x)} for x in (1.0, 3.0)]
    new = fused("fedex", state, deltas, (1, 1), adapter(1, scale=0.5))
    assert (float(new[A]), float(new[B]), float(new[W])) == (2.0, 2.0, 7.5)


def test_organizations_that_agree_leave_the_weight_alone() -> None:
    state = state_of(2)
    [delta] = deltas_of(state, (2,))
    new = fused("fedex", state, [delta, delta], (2, 5), adapter(2))
    close(new[W], state[W].double())
