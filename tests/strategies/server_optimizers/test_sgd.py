from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cotune.strategies import Aggregate, Delta, RoundContext, apply_delta
from cotune.strategies.server_optimizers.sgd import ServerSGD


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def step(
    optimizer: ServerSGD, state: dict[str, Tensor], delta: Delta, memory: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return optimizer.step(state, Aggregate(delta), memory, RoundContext())


def test_by_default_the_delta_is_added() -> None:
    """FedAvg: θ + D."""
    state, memory = step(ServerSGD(), {"w": tensor(1.0, 2.0), "v": tensor(7.0)}, {"w": tensor(0.5, -1.0)}, {})
    assert {name: t.tolist() for name, t in state.items()} == {"w": [1.5, 1.0], "v": [7.0]}
    assert memory == {}


def test_the_learning_rate_scales_the_delta() -> None:
    state, _ = step(ServerSGD(lr=0.5), {"w": tensor(1.0)}, {"w": tensor(4.0)}, {})
    assert state["w"].tolist() == [3.0]


def test_momentum_by_hand() -> None:
    """lr 0.5, momentum 0.75: v = 4, 1 + 3 = 4, 0 + 3 = 3; θ = 0 + 2 + 2 + 1.5."""
    optimizer = ServerSGD(lr=0.5, momentum=0.75)
    state = {"w": tensor(0.0)}
    memory: dict[str, Tensor] = {}
    seen = []
    for delta in (4.0, 1.0, 0.0):
        state, memory = step(optimizer, state, {"w": tensor(delta)}, memory)
        seen.append((state["w"].item(), memory["w"].item()))
    assert seen == [(2.0, 4.0), (4.0, 4.0), (5.5, 3.0)]


def test_momentum_is_that_of_torch() -> None:
    deltas = [torch.randn(5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(6)]
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([parameter], lr=0.3, momentum=0.9)
    state: dict[str, Tensor] = {"w": torch.zeros(5, dtype=torch.float64)}
    memory: dict[str, Tensor] = {}
    for delta in deltas:
        parameter.grad = -delta  # the pseudo-gradient
        reference.step()
        state, memory = step(ServerSGD(lr=0.3, momentum=0.9), state, {"w": delta}, memory)
    torch.testing.assert_close(state["w"], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_nesterov_by_hand() -> None:
    """lr 0.5, momentum 0.5: v = 4, 3; the steps are ½ (4 + 2) and ½ (1 + 1½)."""
    optimizer = ServerSGD(lr=0.5, momentum=0.5, nesterov=True)
    state, memory = step(optimizer, {"w": tensor(0.0)}, {"w": tensor(4.0)}, {})
    assert (state["w"].item(), memory["w"].item()) == (3.0, 4.0)
    state, memory = step(optimizer, state, {"w": tensor(1.0)}, memory)
    assert (state["w"].item(), memory["w"].item()) == (4.25, 3.0)


def test_nesterov_is_that_of_torch() -> None:
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    state: dict[str, Tensor] = {"w": torch.zeros(5, dtype=torch.float64)}
    memory: dict[str, Tensor] = {}
    for round in range(6):
        delta = torch.randn(5, generator=torch.Generator().manual_seed(round), dtype=torch.float64)
        parameter.grad = -delta
        reference.step()
        state, memory = step(ServerSGD(lr=0.7, momentum=0.9, nesterov=True), state, {"w": delta}, memory)
    torch.testing.assert_close(state["w"], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_nesterov_without_momentum_is_the_plain_step() -> None:
    state = {"w": torch.randn(5)}
    delta = {"w": torch.randn(5, dtype=torch.float64)}
    assert torch.equal(step(ServerSGD(nesterov=True), state, delta, {})[0]["w"], step(ServerSGD(), state, delta, {})[0]["w"])


def test_momentum_waits_for_a_parameter_that_nobody_sent() -> None:
    optimizer = ServerSGD(momentum=0.5)
    state = {"a": tensor(0.0), "b": tensor(0.0)}
    state, memory = step(optimizer, state, {"a": tensor(2.0)}, {})
    state, memory = step(optimizer, state, {"b": tensor(1.0)}, memory)
    assert {name: m.tolist() for name, m in memory.items()} == {"a": [2.0], "b": [1.0]}
    state, memory = step(optimizer, state, {"a": tensor(0.0)}, memory)
    assert {name: t.tolist() for name, t in state.items()} == {"a": [3.0], "b": [1.0]}


def test_the_momentum_can_be_saved_between_rounds() -> None:
    """The state is in the arguments alone: a new instance goes on where the old one was."""
    memory = {"w": tensor(4.0, dtype=torch.float64)}
    before = memory["w"].clone()
    results = [step(ServerSGD(lr=1.0, momentum=0.5), {"w": tensor(0.0)}, {"w": tensor(1.0)}, memory) for _ in range(2)]
    assert [state["w"].item() for state, _ in results] == [3.0, 3.0]
    assert torch.equal(memory["w"], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_keep_their_dtype(dtype: torch.dtype, momentum: float) -> None:
    state = {"w": torch.ones(2, dtype=dtype)}
    memory = dict[str, Tensor]()
    for _ in range(2):
        state, memory = step(ServerSGD(momentum=momentum), state, {"w": tensor(0.25, 0.5, dtype=torch.float64)}, memory)
        assert state["w"].dtype == dtype
    assert all(m.dtype == torch.float64 for m in memory.values())


def test_lr_one_without_momentum_is_apply_delta() -> None:
    state = {"w": torch.randn(50)}
    delta = {"w": torch.randn(50, dtype=torch.float64)}
    assert torch.equal(step(ServerSGD(), state, delta, {})[0]["w"], apply_delta(state, delta)["w"])


def test_momentum_is_that_of_torch_with_its_own_schedule() -> None:
    """torch's SGD with LambdaLR, on the pseudo-gradient −D."""
    rounds = 6
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([parameter], lr=0.3, momentum=0.9)
    falling = torch.optim.lr_scheduler.LambdaLR(reference, lambda done: 1 - done / rounds)
    optimizer = ServerSGD(lr=0.3, momentum=0.9, schedule="linear")
    state = {"w": torch.zeros(5, dtype=torch.float64)}
    memory = dict[str, Tensor]()
    for round in range(1, rounds + 1):
        delta = torch.randn(5, generator=torch.Generator().manual_seed(round), dtype=torch.float64)
        parameter.grad = -delta
        reference.step()
        falling.step()
        state, memory = optimizer.step(state, Aggregate({"w": delta}), memory, RoundContext(round=round, rounds=rounds))
    torch.testing.assert_close(state["w"], parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("round", "moved"), [(1, 1.0), (2, 2.0), (3, 2.0)])
def test_warmup_without_momentum(round: int, moved: float) -> None:
    state, memory = ServerSGD(warmup=2).step(
        {"w": torch.zeros(1)}, Aggregate({"w": torch.tensor([2.0])}), {}, RoundContext(round=round, rounds=3)
    )
    assert state["w"].tolist() == [moved]
    assert memory == {}
