from __future__ import annotations

import torch

from tests.support.adapted_layers import HEAD, A, B, adapter, close, deltas_of, fused, products, state_of


def test_product_of_means_differs_from_mean_of_products() -> None:
    """(B, A) = (1, 1) and (3, 3): the mean of the products is 5, the product of the means 4."""
    state = {A: torch.zeros(1, 1), B: torch.zeros(1, 1)}
    deltas = [{A: torch.full((1, 1), x), B: torch.full((1, 1), x)} for x in (1.0, 3.0)]
    new = fused("fedit", state, deltas, (1, 1), adapter(1))
    assert (float(new[A]), float(new[B])) == (2.0, 2.0)
    assert float(products(state, deltas, (1, 1))) == 5.0


def test_every_parameter_is_the_weighted_mean() -> None:
    state = state_of(2)
    counts = (3, 1)
    deltas = deltas_of(state, (2, 2))
    new = fused("fedit", state, deltas, counts, adapter(2))
    for name in (A, B, HEAD):
        close(new[name], state[name].double() + 0.75 * deltas[0][name].double() + 0.25 * deltas[1][name].double())
