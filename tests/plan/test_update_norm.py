from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.update_norm import bound_norm_by_gradients, bound_update_norm
from cotune.plan.wire import Codec, compute_growth


def plan_of(privacy: Any = None, **changes: Any) -> Plan:
    table = {"model": {"base": "x"}, "data": {"source": "y.csv"}, "rounds": 5, "privacy": privacy or {"epsilon": 8.0}}
    return parse_plan({**table, **changes})


def bound(plan: Plan, examples: int = 5_000, entries: int = 1_155, start: float = 1.0) -> float | None:
    return bound_update_norm(plan, plan.stages[0], examples=examples, entries=entries, start=start)


TWEETS = {"learning_rate": 8.0, "momentum": 0.9, "batch_size": 0.2, "steps": 20}


def test_what_the_plan_says_wins() -> None:
    assert bound(plan_of(server={"max_update_norm": 30.0}, privacy="none")) == 30.0


def test_no_bound_follows_without_privacy_or_with_a_client_term() -> None:
    assert bound(plan_of("none")) is None
    assert bound(plan_of(strategy="fedprox")) is None


def test_tweets_plan_is_far_below_the_limit_of_ten_thousand() -> None:
    """Honest norms are 4 to 26 there, and an attacker could send 9,999 in every round."""
    found = bound(plan_of(local=TWEETS))
    assert found is not None
    assert 26 < found < 9_999 / 2


def test_plain_sgd_by_hand() -> None:
    """Each of 4 steps of 0.5 moves by twice a clipped gradient of norm 3 at most."""
    plan = plan_of({"epsilon": 8.0, "clip_norm": 3.0}, local={"learning_rate": 0.5, "steps": 4})
    assert bound_norm_by_gradients(plan, plan.stages[0], 1_000) == pytest.approx(2 * 3 * 0.5 * 4)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4"])
def test_what_rounding_adds_is_allowed_for(codec: Codec) -> None:
    """The bound that follows grows by as much; what the plan says stands, as it is of what arrives."""
    exact = bound(plan_of(local=TWEETS))
    rounded = bound(plan_of(local=TWEETS, wire=codec))
    assert exact is not None
    assert rounded == exact * compute_growth(codec)
    assert bound(plan_of(server={"max_update_norm": 30.0}, wire=codec)) == 30.0
    assert bound(plan_of("none", wire=codec)) is None


STEPS = (1, 4, 13, 30)  # few, as noise is calibrated for each


@given(st.floats(0.01, 10), st.floats(0, 0.95), st.floats(0, 0.2), st.sampled_from(STEPS), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_the_worst_gradients_stay_below_it(rate: float, momentum: float, decay: float, steps: int, seed: int) -> None:
    """torch's own SGD on aligned gradients of the clip norm and Gaussian noise, from some parameters."""
    local = {"learning_rate": rate, "momentum": momentum, "weight_decay": decay, "steps": steps, "batch_size": 100}
    plan = plan_of(local=local)
    rng = np.random.default_rng(seed)
    parameter = torch.tensor(rng.normal(size=200), requires_grad=True)
    start = parameter.detach().clone()
    optimizer = torch.optim.SGD([parameter], lr=rate, momentum=momentum, weight_decay=decay)
    aligned = torch.tensor(rng.normal(size=200))
    for _ in range(steps):
        parameter.grad = aligned / aligned.norm() + 0.02 * torch.tensor(rng.normal(size=200))
        optimizer.step()
    most = bound(plan, entries=200, start=float(start.norm()))
    assert most is None or float((parameter.detach() - start).norm()) <= most


@given(st.sampled_from(["adam", "adamw"]), st.floats(1e-4, 1.0), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_no_gradients_move_adam_beyond_it(kind: str, rate: float, steps: int, seed: int) -> None:
    """Also without privacy, and with gradients that grow and change as they like."""
    plan = plan_of("none", local={"optimizer": kind, "learning_rate": rate, "steps": steps, "weight_decay": 0.01})
    rng = np.random.default_rng(seed)
    parameter = torch.tensor(rng.normal(size=50), requires_grad=True)
    start = parameter.detach().clone()
    build = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    optimizer = build([parameter], lr=rate, weight_decay=0.01)
    for _ in range(steps):
        parameter.grad = torch.tensor(rng.normal(size=50) * 10.0 ** rng.integers(-6, 6))
        optimizer.step()
    most = bound(plan, entries=50, start=float(start.norm()))
    assert most is not None
    assert float((parameter.detach() - start).norm()) <= most


@pytest.mark.parametrize("examples", [1, 7, 10**6, 10**12])
def test_any_count_has_an_answer(examples: int) -> None:
    found = bound(plan_of(local=TWEETS), examples=examples)
    assert found is None or 0 < found < math.inf
