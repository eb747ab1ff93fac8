"""Adam, Yogi and Adagrad on the server against hand-computed steps and against Flower's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.server.strategy import FedAdagrad, FedYogi
from torch import Tensor

from cotune.strategies.server_optimizers.adagrad import ServerAdagrad
from cotune.strategies.server_optimizers.adam import ServerAdam
from cotune.strategies.server_optimizers.base import ServerOptimizer
from cotune.strategies.server_optimizers.yogi import ServerYogi
from cotune.strategies.types import Aggregate, RoundContext

ALL: list[type[Any]] = [ServerAdam, ServerYogi, ServerAdagrad]


def play(optimizer: ServerOptimizer, deltas: list[float]) -> list[tuple[float, float, float]]:
    """(θ, m, v) after each round of one coordinate that starts at 0."""
    state = {"w": torch.zeros(1, dtype=torch.float64)}
    memory = dict[str, Tensor]()
    seen = []
    for round, d in enumerate(deltas, start=1):
        fused = Aggregate({"w": torch.tensor([d], dtype=torch.float64)})
        state, memory = optimizer.step(state, fused, memory, RoundContext(round=round, rounds=len(deltas)))
        seen.append((state["w"].item(), memory["m/w"].item(), memory["v/w"].item()))
    return seen


def test_adam_by_hand() -> None:
    """τ = 1, so v starts at 1. β1 = β2 = ½, D = 2, 0, −2:
    m = 1, ½, −¾; v = ½ + 2 = 2.5, 1.25, 0.625 + 2 = 2.625."""
    seen = play(ServerAdam(lr=0.5, beta1=0.5, beta2=0.5, tau=1.0), [2.0, 0.0, -2.0])
    assert [(m, v) for _, m, v in seen] == [(1.0, 2.5), (0.5, 1.25), (-0.75, 2.625)]
    steps = [0.5 * m / (math.sqrt(v) + 1) for m, v in [(1.0, 2.5), (0.5, 1.25), (-0.75, 2.625)]]
    assert [theta for theta, _, _ in seen] == pytest.approx(list(np.cumsum(steps)))


def test_yogi_by_hand() -> None:
    """v from 1: D² = 4 > v: + 2 = 3; D² = 0 < v: − 0 = 3; D² = 1 < v: − ½ = 2.5. Adam would be at 2.5, 1.25, 1.125."""
    seen = play(ServerYogi(lr=0.5, beta1=0.5, beta2=0.5, tau=1.0), [2.0, 0.0, 1.0])
    assert [(m, v) for _, m, v in seen] == [(1.0, 3.0), (0.5, 3.0), (0.75, 2.5)]
    steps = [0.5 * m / (math.sqrt(v) + 1) for _, m, v in seen]
    assert [theta for theta, _, _ in seen] == pytest.approx(list(np.cumsum(steps)))


def test_adagrad_by_hand() -> None:
    """v = 1 + 4 + 0 + 4; without momentum a round without a delta stands still."""
    seen = play(ServerAdagrad(lr=0.5, tau=1.0), [2.0, 0.0, -2.0])
    assert [(m, v) for _, m, v in seen] == [(2.0, 5.0), (0.0, 5.0), (-2.0, 9.0)]
    assert [theta for theta, _, _ in seen] == pytest.approx([1 / (math.sqrt(5) + 1)] * 2 + [1 / (math.sqrt(5) + 1) - 1 / 4])


@pytest.mark.parametrize(
    ("own", "flower"),
    [
        (
            ServerYogi(lr=0.3, beta1=0.8, beta2=0.7, tau=0.05),
            lambda start: FedYogi(initial_parameters=start, eta=0.3, beta_1=0.8, beta_2=0.7, tau=0.05),
        ),
        (
            ServerAdagrad(lr=0.3, tau=0.05),
            lambda start: FedAdagrad(initial_parameters=start, eta=0.3, tau=0.05),
        ),
    ],
)
def test_they_are_those_of_flower(own: ServerOptimizer, flower: Any) -> None:
    """Flower's v starts at 0 where the paper asks for τ² at least; with the paper's start given to it, the steps are the same."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=5)
    reference = flower(ndarrays_to_parameters([theta]))
    reference.v_t = [np.full(5, 0.05**2)]
    state = {"w": torch.from_numpy(theta.copy())}
    memory = dict[str, Tensor]()
    for _ in range(6):
        delta = rng.normal(size=5)
        reference = _flower_step(reference, delta)
        state, memory = own.step(state, Aggregate({"w": torch.from_numpy(delta)}), memory, RoundContext())
        np.testing.assert_allclose(state["w"].numpy(), reference.current_weights[0], rtol=1e-10)


def _flower_step(strategy: Any, delta: np.ndarray[Any, Any]) -> Any:
    """One client whose model is Flower's current one plus the delta."""
    parameters = ndarrays_to_parameters([strategy.current_weights[0] + delta])
    strategy.aggregate_fit(1, [(None, FitRes(Status(Code.OK, ""), parameters, 1, {}))], [])
    return strategy


@pytest.mark.parametrize("kind", ALL)
def test_a_parameter_that_waits_keeps_its_moments(kind: Any) -> None:
    optimizer = kind()
    state = {"a": torch.zeros(1), "b": torch.zeros(1)}
    state, memory = optimizer.step(state, Aggregate({"a": torch.ones(1)}), {}, RoundContext())
    before = {name: tensor.clone() for name, tensor in memory.items()}
    moved, memory = optimizer.step(state, Aggregate({"b": torch.ones(1)}), memory, RoundContext())
    assert torch.equal(moved["a"], state["a"])
    assert torch.equal(moved["b"], state["a"])  # the same first step
    assert all(torch.equal(memory[name], tensor) for name, tensor in before.items())
    assert set(memory) == {"m/a", "v/a", "m/b", "v/b"}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_state_keeps_its_type_and_the_memory_is_exact(kind: Any, dtype: torch.dtype) -> None:
    state, memory = kind().step(
        {"w": torch.ones(2, dtype=dtype)}, Aggregate({"w": torch.tensor([0.25, -1.0])}), {}, RoundContext()
    )
    assert state["w"].dtype == dtype
    assert all(tensor.dtype == torch.float64 for tensor in memory.values())


@pytest.mark.parametrize("kind", ALL)
def test_the_schedule_scales_the_step(kind: Any) -> None:
    whole, half = (play(kind(lr=0.5, schedule="linear", warmup=w), [1.0, 1.0])[0][0] for w in (0, 2))
    assert half == pytest.approx(whole / 2)
