from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays


@given(
    deltas=arrays(np.float64, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.floats(-100, 100, width=16)),
    density=st.floats(0.05, 1.0),
    data=st.data(),
)
def test_it_is_ties(fuse: Any, deltas: np.ndarray, density: float, data: st.DataObject) -> None:
    """Values and weights whose sums are exact, so that a tie of signs is one in both."""
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(deltas), max_size=len(deltas)))
    both = [fuse(name, list(deltas), weights, density=density, scale=0.5) for name in ("ties", "ties_sums")]
    np.testing.assert_allclose(both[1], both[0], rtol=1e-12, atol=1e-12)


def test_by_hand(fuse: Any) -> None:
    """As for ties: signs +, +, −, none."""
    deltas = [[5.0, 1.0, -4.0, 0.5], [-2.0, 3.0, 1.0, 0.5], [6.0, -1.0, 2.0, -0.5]]
    assert fuse("ties_sums", deltas, density=0.5).tolist() == [5.5, 3.0, -4.0, 0.0]


def test_parameters_may_differ(fuse: Any) -> None:
    deltas = [{"a": [1.0], "b": [5.0]}, {"a": [3.0]}]
    both = [fuse(name, deltas, [1.0, 3.0], density=1.0) for name in ("ties", "ties_sums")]
    assert both[0] == both[1]
    assert both[1]["b"].tolist() == [5.0]
