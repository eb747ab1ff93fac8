from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotune.server.rounds.updates.update_validation import UpdateSpec, max_bytes
from cotune.strategies.types import Update

SHAPES = {"head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)}
GOOD = Update("org-1", 3, {name: torch.ones_like(tensor) for name, tensor in SHAPES.items()}, examples=5, steps=1)


def reason_of(update: Update, max_norm: float = 1e4, **spec: Any) -> str | None:
    """What is wrong with an update of org-1 by a spec; None: nothing."""
    result = UpdateSpec(round=3, shapes=SHAPES, max_norm=lambda examples: max_norm, **spec).validate(update, "org-1")
    assert result.is_valid is (result.reason == "")
    return result.reason or None


def verdict(max_norm: float = 1e4, **changes: Any) -> str | None:
    return reason_of(Update(**{**vars(GOOD), **changes}), max_norm)


def delta(**changes: Any) -> dict[str, torch.Tensor]:
    return {**GOOD.delta, **{name.replace("_", "."): tensor for name, tensor in changes.items()}}


def test_a_good_update_passes() -> None:
    assert verdict() is None
    assert verdict(delta={name: torch.zeros_like(tensor) for name, tensor in SHAPES.items()}) is None
    assert verdict(delta=dict(reversed(GOOD.delta.items()))) is None  # the order of names means nothing
    assert verdict(examples=1) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"organization": "org-2"}, "it is from org-2, expected org-1"),
        ({"organization": "x" * 10_000}, f"it is from {'x' * 80}, expected org-1"),
        ({"round": 2}, "it is for round 2, expected 3"),
        ({"round": 4}, "it is for round 4, expected 3"),
        ({"examples": 0}, "it declares 0 examples, expected at least 1"),
        ({"examples": -7}, "it declares -7 examples, expected at least 1"),
        ({"delta": {}}, "it has 0 parameters too many and lacks 2 (head.bias, head.weight)"),
        ({"delta": {"head.weight": torch.ones(2, 3)}}, "it has 0 parameters too many and lacks 1 (head.bias)"),
        ({"delta": delta(encoder_weight=torch.ones(1))}, "it has 1 parameters too many and lacks 0 (encoder.weight)"),
        ({"delta": delta(head_bias=torch.ones(3))}, "head.bias has the shape (3,), expected (2,)"),
        ({"delta": delta(head_bias=torch.ones(2, 1))}, "head.bias has the shape (2, 1), expected (2,)"),
        ({"delta": delta(head_weight=torch.ones(3, 2))}, "head.weight has the shape (3, 2), expected (2, 3)"),
        ({"delta": delta(head_bias=torch.ones(()))}, "head.bias has the shape (), expected (2,)"),
        ({"delta": delta(head_bias=torch.tensor([1.0, math.nan]))}, "it has values that are not finite"),
        ({"delta": delta(head_bias=torch.tensor([math.inf, 1.0]))}, "it has values that are not finite"),
        ({"delta": delta(head_bias=torch.tensor([1.0, -math.inf]))}, "it has values that are not finite"),
        ({"delta": delta(head_bias=torch.tensor([3e38, 3e38]))}, "its norm is 4.24e+38, expected at most 10000"),
        ({"noise_variance": {}}, "it states noise for 0 parameters, expected it for the 2 of its delta"),
        (
            {"noise_variance": {"head.bias": 1.0, "x": 1.0}},
            "it states noise for 2 parameters, expected it for the 2 of its delta",
        ),
        (
            {"noise_variance": {"head.bias": 1.0, "head.weight": -1.0}},
            "it states the noise variance -1.0 for head.weight, expected a finite number, 0 or more",
        ),
        (
            {"noise_variance": {"head.bias": math.nan, "head.weight": 1.0}},
            "it states the noise variance nan for head.bias, expected a finite number, 0 or more",
        ),
    ],
)
def test_what_is_not_as_agreed_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert verdict(**changes) == reason


def test_a_reason_stays_short_however_long_the_names_are() -> None:
    strange = {f"{i}{'y' * 5_000}": torch.ones(1) for i in range(50)}
    assert len(verdict(delta=strange) or "") < 400


finite = st.floats(-1e3, 1e3, width=32)


@given(weight=st.lists(finite, min_size=6, max_size=6), bias=st.lists(finite, min_size=2, max_size=2), limit=st.floats(1e-3, 1e4))
def test_update_passes_exactly_within_the_norm_limit(weight: list[float], bias: list[float], limit: float) -> None:
    norm = float(np.linalg.norm(np.array([*weight, *bias], dtype=np.float64)))
    reason = verdict(limit, delta={"head.weight": torch.tensor(weight).reshape(2, 3), "head.bias": torch.tensor(bias)})
    if norm > limit * (1 + 1e-9):
        assert reason == f"its norm is {norm:.3g}, expected at most {limit:g}"
    elif norm < limit * (1 - 1e-9):
        assert reason is None


@given(place=st.integers(0, 7), value=st.sampled_from([math.nan, math.inf, -math.inf]), limit=st.floats(1e-3, 1e300))
def test_one_value_that_is_not_finite_is_enough_to_refuse(place: int, value: float, limit: float) -> None:
    values = torch.ones(8)
    values[place] = value
    reason = verdict(limit, delta={"head.weight": values[:6].reshape(2, 3), "head.bias": values[6:]})
    assert reason == "it has values that are not finite"


def test_noise_must_be_above_zero_where_weights_depend_on_it() -> None:
    """Otherwise who states nothing, or 0, would count for more than all who are honest."""

    def needed(**changes: Any) -> str | None:
        update = Update(**{**vars(GOOD), **changes})
        return reason_of(update, needs_noise=True)

    assert needed(noise_variance={"head.bias": 1e-9, "head.weight": 2.0}) is None
    assert "does not state the noise" in (needed() or "")
    assert "expected a finite number, more than 0" in (needed(noise_variance={"head.bias": 0.0, "head.weight": 2.0}) or "")
    assert verdict(noise_variance={"head.bias": 0.0, "head.weight": 2.0}) is None


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        (9, "it declares 9 examples, expected 10 to 20"),
        (10, None),
        (20, None),
        (21, "it declares 21 examples, expected 10 to 20"),
    ],
)
def test_the_declared_count_is_held_to_its_range(declared: int, reason: str | None) -> None:
    update = Update(**{**vars(GOOD), "examples": declared})
    found = reason_of(update, example_bounds={"org-1": (10, 20)})
    assert found == reason


def test_what_the_plan_does_not_ask_for_is_not_kept_for_ever() -> None:
    """It would stand in the history, with every checkpoint."""
    update = Update(**{**vars(GOOD), "disclosures": {"loss": 1.0, "my opinion": 2.0}})

    def refused(told: set[str]) -> str | None:
        return reason_of(update, disclosures=told)

    assert refused({"loss", "my opinion"}) is None
    assert refused({"loss"}) == "it discloses 'my opinion', which the plan does not ask for"


def test_an_update_must_name_the_model_that_it_was_trained_from() -> None:
    def found(received: str) -> str | None:
        update = Update(**{**vars(GOOD), "received": received})
        return reason_of(update, received="a" * 64)

    assert found("a" * 64) is None
    assert found("b" * 99) == "it was trained from another model (bbbbbbbbbbbb), expected that of this round (aaaaaaaaaaaa)"
    assert found("") is not None


def test_max_bytes_is_what_is_asked_for_and_a_little_more() -> None:
    assert max_bytes(0, {}, {}, "float32") == 2**20
    arrays = 4 * (6 + 9 + 2)
    assert max_bytes(100, {"w": (2, 3)}, {"g": (3, 3), "f": (2,)}, "float32") == 2**20 + 400 + arrays + 3 * (1024 + 4)
