from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotune.strategies.fusions.averaging.fednova import effective_steps
from cotune.strategies.types import LocalSteps, RoundContext
from tests.support.failures import fails_with

CONTEXT = RoundContext(local=LocalSteps(steps=20))


@given(steps=st.integers(1, 30), momentum=st.floats(0, 0.99))
def test_effective_steps_by_unrolling(steps: int, momentum: float) -> None:
    """Local SGD by torch with η = 1 on gradients that are one-hot: the delta is −a itself."""
    x = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum)
    for i in range(steps):
        x.grad = torch.eye(steps, dtype=torch.float64)[i]
        optimizer.step()
    assert effective_steps(steps, momentum) == pytest.approx(float(x.detach().abs().sum()), rel=1e-9)


def test_effective_steps_by_hand() -> None:
    """μ = ½, K = 3: a = (1 + ½ + ¼, 1 + ½, 1)."""
    assert effective_steps(3, 0.5) == 4.25
    assert effective_steps(7, 0.0) == 7.0


def test_by_hand(fuse: Any) -> None:
    """τ = 2, 8 and p = ¼, ¾: τ_eff = 6.5; mean of Δ/τ = ¼·3 + ¾·(−1) = 0 and ¼·1 + ¾·2 = 1.75."""
    changes = [{"steps": 2}, {"steps": 8}]
    found = fuse("fednova", [[6.0, 2.0], [-8.0, 16.0]], [1.0, 3.0], context=CONTEXT, changes=changes)
    assert found.tolist() == pytest.approx([0.0, 11.375])


def test_with_equal_steps_it_is_fedavg(fuse: Any, rng: np.random.Generator) -> None:
    deltas = list(rng.normal(size=(4, 6)))
    weights = [1.0, 2.0, 3.0, 4.0]
    context = RoundContext(local=LocalSteps(momentum=0.9, steps=5))
    found = fuse("fednova", deltas, weights, context=context, changes=[{"steps": 5}] * 4)
    assert found == pytest.approx(fuse("mean", deltas, weights), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_ends_at_the_joint_optimum_where_fedavg_does_not(fuse: Any, momentum: float) -> None:
    """Two quadratics ½(x − c_k)², 2 and 12 local steps: the paper's example of objective inconsistency. The optimum is 0."""
    centers = (-1.0, 1.0)
    steps = (2, 12)
    rate = 0.002
    context = RoundContext(local=LocalSteps(rate, momentum, 12))

    def local(x: float, k: int) -> float:
        p = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([p], lr=rate, momentum=momentum)
        for _ in range(steps[k]):
            optimizer.zero_grad()
            (0.5 * (p - centers[k]) ** 2).sum().backward()
            optimizer.step()
        return float(p.detach()) - x

    ends = {}
    for name in ("fednova", "mean"):
        x = 0.5
        for _ in range(400 if momentum == 0 else 60):
            x += fuse(name, [[local(x, k)] for k in (0, 1)], context=context, changes=[{"steps": s} for s in steps]).item()
        ends[name] = x
    assert abs(ends["fednova"]) < 0.05
    assert ends["mean"] > 0.5


def test_a_parameter_that_one_alone_trains_moves_as_it_did(fuse: Any) -> None:
    found = fuse("fednova", [{"a": [2.0], "b": [5.0]}, {"a": [4.0]}], context=CONTEXT, changes=[{"steps": 1}, {"steps": 4}])
    assert (found["a"].item(), found["b"].item()) == (2.5 * 1.5, 5.0)


@pytest.mark.parametrize("steps", [0, -1, 21])
def test_more_or_fewer_steps_than_can_be_are_refused(fuse: Any, steps: int) -> None:
    with fails_with("run.invalid_steps", "org-1", str(steps)):
        fuse("fednova", [[1.0], [1.0]], context=CONTEXT, changes=[{"steps": 1}, {"steps": steps}])
