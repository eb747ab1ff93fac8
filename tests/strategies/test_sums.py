"""What norms of deltas do not depend on, and one mean for parameters and predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cotune.ensembles.fusion import weighted_mean
from cotune.strategies.sums import add_weighted, average, divide, norm
from cotune.strategies.types import Update, WeightedUpdate


def test_a_norm_by_hand() -> None:
    assert norm({"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor(4.0)}) == 5.0
    assert norm({}) == 0.0


def test_norm_is_bit_equal_for_any_parameter_order() -> None:
    """A file keeps another order than the sender. Added to 2⁵⁴ one by one, forty ones are lost."""
    delta = {"large": torch.tensor(2.0**27), **{str(i): torch.ones(()) for i in range(40)}}
    assert norm(delta) == norm(dict(reversed(delta.items()))) == math.sqrt(2**54 + 40)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.lists(st.floats(-10, 10), min_size=3, max_size=3)), min_size=1, max_size=6))
def test_predictions_and_parameters_are_averaged_alike(parts: list[tuple[float, list[float]]]) -> None:
    """Σ w_i y_i / Σ w_i of an ensemble's predictions, of a round's updates, and by NumPy."""
    weights = [weight for weight, _ in parts]
    rows = torch.tensor([row for _, row in parts], dtype=torch.float32)
    expected = np.average(rows.double().numpy(), axis=0, weights=weights)
    sums: dict[str, Tensor] = {}
    for weight, row in zip(weights, rows, strict=True):
        update = Update("org", 1, {"x": row}, examples=1, steps=1)
        add_weighted(sums, WeightedUpdate(update, weight, {"x": torch.zeros(3)}))
    of_parameters = divide(sums)["x"]
    values = [*rows.double()]
    of_predictions = average(values, [torch.tensor(weight, dtype=torch.float64) for weight in weights])
    assert of_predictions.numpy() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(of_predictions, of_parameters)
    fused = weighted_mean(rows.double().numpy()[:, None, :], np.array(weights))[0]
    assert fused.tolist() == of_parameters.tolist()
