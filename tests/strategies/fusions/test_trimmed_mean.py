from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from cotune.strategies.registry import get_builtin_components
from tests.support.failures import fails_with


def test_by_hand(fuse: Any) -> None:
    assert fuse("trimmed_mean", [[-100.0], [1.0], [2.0], [6.0], [50.0]], fraction=0.2).tolist() == [3.0]


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.1), (10, 0.3), (7, 0.2), (15, 0.2), (9, 0.49), (3, 0.34)])
def test_against_scipy_and_byzfl(fuse: Any, byzfl: Any, rng: np.random.Generator, count: int, fraction: float) -> None:
    deltas = rng.normal(size=(count, 12))
    found = fuse("trimmed_mean", list(deltas), fraction=fraction)
    assert found == pytest.approx(stats.trim_mean(deltas, fraction), rel=1e-12)
    assert found == pytest.approx(byzfl.TrMean(int(fraction * count + 1e-9))(deltas), rel=1e-12)


def test_a_round_in_which_nothing_would_be_cut_off_is_refused(fuse: Any) -> None:
    assert get_builtin_components("fusion")["trimmed_mean"].min_updates(fraction=0.1) == 10
    with fails_with("run.too_few_updates", "5", "4"):
        fuse("trimmed_mean", [[1.0]] * 4, fraction=0.2)


@pytest.mark.parametrize("count", range(3, 200))
def test_with_a_fraction_of_one_update_exactly_one_is_cut_off(fuse: Any, count: int) -> None:
    """1/49 · 49 is less than 1 in floating point."""
    assert get_builtin_components("fusion")["trimmed_mean"].min_updates(fraction=1 / count) == count
    assert fuse("trimmed_mean", [[0.0]] * (count - 1) + [[1e9]], fraction=1 / count).tolist() == [0.0]


@pytest.mark.parametrize("fraction", [0.0, 0.5, -0.1])
def test_a_fraction_that_leaves_all_or_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        get_builtin_components("fusion")["trimmed_mean"].check({"fraction": fraction})
