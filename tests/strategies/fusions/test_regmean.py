from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cotune.strategies.aggregator import build_aggregator
from cotune.strategies.config import StrategyConfig
from cotune.strategies.types import Aggregate, RoundContext, Update


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def fused(*updates: Update, off_diagonal: float = 1.0) -> dict[str, Tensor]:
    strategy = StrategyConfig.model_validate({"fusion": {"name": "regmean", "off_diagonal": off_diagonal}})
    combination = build_aggregator(strategy, RoundContext())
    for one in updates:
        combination.add(one)
    found = combination.result()
    assert isinstance(found, Aggregate)
    return dict(found.delta)


def regression(x: Tensor, y: Tensor, start: Tensor, *, bias: bool) -> Update:
    """The optimum of an organization's own least squares, as a delta from `start` (out, in [+ 1]); the mean Gram matrix."""
    x = with_ones(x) if bias else x
    best = torch.linalg.lstsq(x, y).solution.T - start
    width = best.shape[1] - bias
    delta = {"l.weight": best[:, :width], **({"l.bias": best[:, width]} if bias else {})}
    return Update("org", 1, delta, len(x), 1, statistics={"gram/l.weight": x.T @ x / len(x)})


@pytest.mark.parametrize("bias", [True, False])
def test_two_regressions_become_that_of_the_pooled_records(bias: bool) -> None:
    sizes = (30, 70)
    xs = [draw(n, 4, seed=n) * (k + 1) for k, n in enumerate(sizes)]
    ys = [draw(n, 2, seed=100 + n) + k for k, n in enumerate(sizes)]
    start = draw(2, 4 + bias, seed=5)
    delta = fused(*(regression(x, y, start, bias=bias) for x, y in zip(xs, ys, strict=True)))
    whole = torch.cat(xs)
    expected = torch.linalg.lstsq(with_ones(whole) if bias else whole, torch.cat(ys)).solution.T - start
    found = torch.cat([delta["l.weight"], delta["l.bias"][:, None]], dim=1) if bias else delta["l.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_by_hand() -> None:
    """G = diag(1, 1) and diag(3, 1) of Δ = (8, 8) and (4, 4): 20/4 and 12/2."""
    updates = [
        Update("org", 1, {"l.weight": torch.full((1, 2), value)}, 1, 1, statistics={"gram/l.weight": torch.tensor(gram).diag()})
        for value, gram in ((8.0, [1.0, 1.0]), (4.0, [3.0, 1.0]))
    ]
    assert fused(*updates)["l.weight"].tolist() == [pytest.approx([5.0, 6.0])]


def test_only_the_diagonal_is_the_mean_by_each_inputs_size() -> None:
    updates = [regression(draw(20, 3, seed=k), draw(20, 2, seed=9 + k), torch.zeros(2, 3), bias=False) for k in (1, 2)]
    diagonals = [u.statistics["gram/l.weight"].diag() for u in updates]
    expected = sum(u.delta["l.weight"] * d for u, d in zip(updates, diagonals, strict=True)) / (diagonals[0] + diagonals[1])
    torch.testing.assert_close(fused(*updates, off_diagonal=0.0)["l.weight"], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_identical_deltas_stay_and_constant_inputs_give_mean(off_diagonal: float) -> None:
    """Five records of six inputs, the last of which is always 0, in float32 as it travels."""
    x = draw(5, 6, seed=1)
    x[:, 5] = 0
    gram = (x.T @ x / 5).to(torch.float32)
    one = draw(2, 6, seed=2)
    other = draw(2, 6, seed=3)
    updates = [Update("org", 1, {"l.weight": d}, 1, 1, statistics={"gram/l.weight": gram}) for d in (one, other)]
    torch.testing.assert_close(fused(*updates, off_diagonal=off_diagonal)["l.weight"], (one + other) / 2, rtol=1e-9, atol=1e-9)
    same = fused(updates[0], updates[0], off_diagonal=off_diagonal)["l.weight"]
    torch.testing.assert_close(same, one, rtol=1e-9, atol=1e-9)


def test_what_is_no_linear_layer_is_averaged() -> None:
    updates = [Update("org", 1, {"norm.weight": torch.tensor([v])}, n, 1) for v, n in ((1.0, 3), (5.0, 1))]
    assert fused(*updates)["norm.weight"].tolist() == [2.0]
