from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cotune.strategies.fusions.robust.update_geometry import clip_to_norm


def test_by_hand(fuse: Any) -> None:
    """(3, 4) has the norm 5 and becomes (0.6, 0.8); (0, 0.5) stays. Weights 1 and 3."""
    assert fuse("norm_bound", [[3.0, 4.0], [0.0, 0.5]], [1.0, 3.0], norm=1.0).tolist() == pytest.approx([0.15, 0.575])


def test_the_norm_is_of_the_whole_delta(fuse: Any) -> None:
    found = fuse("norm_bound", [{"a": [3.0], "b": [[4.0]]}], norm=1.0)
    assert (found["a"].item(), found["b"].item()) == pytest.approx((0.6, 0.8))


def test_below_the_bound_it_is_the_mean(fuse: Any, rng: np.random.Generator) -> None:
    deltas = list(rng.normal(size=(5, 6)))
    weights = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert np.array_equal(fuse("norm_bound", deltas, weights, norm=1e3), fuse("mean", deltas, weights))


def test_clipped_has_the_direction_and_at_most_the_norm() -> None:
    delta = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    short = clip_to_norm({"x": delta}, 0.1)["x"]
    assert float(short.norm()) == pytest.approx(0.1)
    assert torch.allclose(short / short.norm(), delta / delta.norm())
    assert torch.equal(clip_to_norm({"x": delta * 0}, 0.1)["x"], delta * 0)
