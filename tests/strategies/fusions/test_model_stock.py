from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.support.failures import fails_with


def ratio(deltas: np.ndarray) -> float:
    """The paper's t, with the mean over all pairs of their cosines."""
    pairs = itertools.combinations(deltas, 2)
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    return float(len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine))


def test_by_hand(fuse: Any) -> None:
    """45° apart: t = 2 cos / (1 + cos), whatever the lengths. Mean (3, 2)."""
    t = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    assert fuse("model_stock", [[2.0, 0.0], [4.0, 4.0]]).tolist() == pytest.approx([3 * t, 2 * t])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_against_the_formula_over_all_pairs(fuse: Any, rng: np.random.Generator, count: int) -> None:
    deltas = rng.normal(size=(count, 30)) + 1.0
    found = fuse("model_stock", list(deltas))
    assert found == pytest.approx(ratio(deltas) * deltas.mean(axis=0), rel=1e-9)


def test_two_updates_give_the_closed_form_point(fuse: Any, rng: np.random.Generator) -> None:
    """The paper's geometry: Δ_k = center + noise of one length, square to the center and to one another. D is then the foot of
    the perpendicular from the center to the line from 0 to the mean."""
    frame, _ = np.linalg.qr(rng.normal(size=(9, 3)))
    center = 2.0 * frame[:, 0]
    deltas = np.stack([center + 1.5 * frame[:, k] for k in (1, 2)])
    found = fuse("model_stock", list(deltas))
    assert found @ (center - found) == pytest.approx(0, abs=1e-9)


def test_per_parameter_every_one_has_its_own_angle(fuse: Any) -> None:
    """`a` is agreed upon (t = 1), `b` is square (t = 0); over the model the cosine is 1 / (1 + 9)."""
    deltas = [{"a": [1.0], "b": [3.0, 0.0]}, {"a": [1.0], "b": [0.0, 3.0]}]
    each = fuse("model_stock", deltas, per="parameter")
    whole = fuse("model_stock", deltas)
    assert (each["a"].tolist(), each["b"].tolist()) == (pytest.approx([1.0]), pytest.approx([0.0, 0.0]))
    t = 2 * 0.1 / 1.1
    assert (whole["a"].tolist(), whole["b"].tolist()) == (pytest.approx([t]), pytest.approx([1.5 * t, 1.5 * t]))


def test_where_updates_point_against_one_another_the_model_stays(fuse: Any) -> None:
    assert fuse("model_stock", [[1.0, 0.2], [-1.0, 0.2]]).tolist() == [0.0, 0.0]
    assert fuse("model_stock", [[0.0, 0.0], [0.0, 0.0]]).tolist() == [0.0, 0.0]


def test_a_parameter_of_one_organization_alone_is_taken_as_it_is(fuse: Any) -> None:
    found = fuse("model_stock", [{"a": [1.0], "b": [4.0]}, {"a": [1.0]}], per="parameter")
    assert found["b"].tolist() == [4.0]


def test_one_update_has_no_angle(fuse: Any) -> None:
    with fails_with("run.too_few_updates", "2", "1"):
        fuse("model_stock", [[1.0]])
