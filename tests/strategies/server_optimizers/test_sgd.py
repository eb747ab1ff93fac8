from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cotune.strategies.round import Fused, RoundContext
from cotune.strategies.server_optimizers.sgd import ServerSGD


def test_momentum_is_that_of_torch_with_its_own_schedule() -> None:
    """torch's SGD with LambdaLR, on the pseudo-gradient −D."""
    rounds, parameter = 6, torch.zeros(5, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([parameter], lr=0.3, momentum=0.9)
    falling = torch.optim.lr_scheduler.LambdaLR(reference, lambda done: 1 - done / rounds)
    optimizer = ServerSGD(lr=0.3, momentum=0.9, schedule="linear")
    state, memory = {"w": torch.zeros(5, dtype=torch.float64)}, dict[str, Tensor]()
    for round in range(1, rounds + 1):
        delta = torch.randn(5, generator=torch.Generator().manual_seed(round), dtype=torch.float64)
        parameter.grad = -delta
        reference.step()
        falling.step()
        state, memory = optimizer.step(state, Fused({"w": delta}), memory, RoundContext(round=round, rounds=rounds))
    torch.testing.assert_close(state["w"], parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("round", "moved"), [(1, 1.0), (2, 2.0), (3, 2.0)])
def test_warmup_without_momentum(round: int, moved: float) -> None:
    state, memory = ServerSGD(warmup=2).step(
        {"w": torch.zeros(1)}, Fused({"w": torch.tensor([2.0])}), {}, RoundContext(round=round, rounds=3)
    )
    assert state["w"].tolist() == [moved]
    assert memory == {}
