from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cotune.strategies.aggregator import build_aggregator
from cotune.strategies.config import StrategyConfig
from cotune.strategies.server_optimizers.fedexp import FedExP
from cotune.strategies.types import Aggregate, RoundContext, Update


def fused_of(*deltas: list[float], examples: tuple[int, ...] | None = None) -> Aggregate:
    """The weighted mean of these deltas with what the driver says about them."""
    combination = build_aggregator(StrategyConfig(), RoundContext())
    for k, (delta, n) in enumerate(zip(deltas, examples or (1,) * len(deltas), strict=True)):
        combination.add(Update(f"org-{k}", 1, {"w": torch.tensor(delta)}, n, 1))
    found = combination.result()
    assert isinstance(found, Aggregate)
    return found


def stepped(fused: Aggregate, **parameters: float) -> Tensor:
    return FedExP(**parameters).step({"w": torch.zeros(2)}, fused, {}, RoundContext())[0]["w"]


def test_by_hand() -> None:
    """Two at right angles: D = (2, 2), η_g = 16 / (2·(8 + 2)) < 1, so 1. Four: D = (2, 2, 2, 2), η_g = 64 / (2·16) = 2."""
    assert stepped(fused_of([4.0, 0.0], [0.0, 4.0]), epsilon=2.0).tolist() == [2.0, 2.0]
    four = fused_of(*(8.0 * torch.eye(4)).tolist())
    state, _ = FedExP(epsilon=1e-12).step({"w": torch.zeros(4)}, four, {}, RoundContext())
    assert state["w"].tolist() == pytest.approx([4.0] * 4)


def test_the_weights_are_in_the_norms() -> None:
    """Weights ¾ and ¼ of Δ = (8, 0), (−8, 0): D = (4, 0), Σp‖Δ‖² = 64, η_g = 64 / (2·(16 + 4)) = 1.6."""
    assert stepped(fused_of([8.0, 0.0], [-8.0, 0.0], examples=(3, 1)), epsilon=4.0).tolist() == pytest.approx([6.4, 0.0])


def test_identical_updates_are_added_as_they_are() -> None:
    assert stepped(fused_of([1.0, -2.0], [1.0, -2.0])).tolist() == [1.0, -2.0]


def test_the_last_two_iterates_are_served_as_their_mean() -> None:
    optimizer = FedExP()
    state = {"w": torch.zeros(1), "frozen": torch.ones(1)}
    assert torch.equal(optimizer.serve(state, {})["w"], state["w"])
    memory = dict[str, Tensor]()
    for delta in (2.0, 4.0):
        state, memory = optimizer.step(state, Aggregate({"w": torch.tensor([delta])}, 1, delta**2), memory, RoundContext())
    assert state["w"].tolist() == [6.0]
    served = optimizer.serve(state, memory)
    assert {name: tensor.tolist() for name, tensor in served.items()} == {"w": [4.0], "frozen": [1.0]}
