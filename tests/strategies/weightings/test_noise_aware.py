from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotune.strategies.types import Update
from cotune.strategies.weightings.noise_aware import noise_aware, random_effects


def update(values: dict[str, list[float]], noise: dict[str, float] | None = None) -> Update:
    return Update("a", 1, {n: torch.tensor(v) for n, v in values.items()}, 10, 1, 1.0, noise_variance=noise)


def of(deltas: np.ndarray, variances: list[float]) -> list[Update]:
    return [
        Update(f"org-{i}", 1, {"w": torch.from_numpy(d.astype(np.float32))}, 10, 1, 1.0, noise_variance={"w": v})
        for i, (d, v) in enumerate(zip(deltas, variances, strict=True))
    ]


def test_tau_squared_and_weights_by_hand() -> None:
    """Δ = 0, 6, v = 1, 2, d = 1: w = 1, ½; mean = 2; Q = 4 + 8 = 12; Σw − Σw²/Σw = 1.5 − 1.25/1.5 = ⅔; τ² = (12 − 1)/⅔ = 16.5."""
    found = random_effects([update({"w": [0.0]}), update({"w": [6.0]})], ["w"], [1.0, 2.0])
    assert found.between == pytest.approx(16.5)
    assert found.weights == pytest.approx((1.0, 17.5 / 18.5))


def test_the_textbook_formula_over_many_coordinates() -> None:
    rng = np.random.default_rng(0)
    v = np.array([0.3, 1.0, 4.0, 9.0])
    deltas = rng.normal(size=(4, 50)) * 3
    w = 1 / v
    mean = (w[:, None] * deltas).sum(0) / w.sum()
    q = (w[:, None] * (deltas - mean) ** 2).sum()
    expected = (q - 50 * 3) / (50 * (w.sum() - (w**2).sum() / w.sum()))
    found = random_effects(of(deltas, list(v)), ["w"], list(v))
    assert found.between == pytest.approx(expected, rel=1e-5)
    assert found.weights == pytest.approx((v[0] + expected) / (v + expected), rel=1e-5)


@pytest.mark.parametrize("between", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("variances", [[0.1, 1.0, 3.0, 10.0, 40.0], [0.0, 1.0, 3.0, 10.0, 40.0]])
def test_the_between_variance_is_found(between: float, variances: list[float]) -> None:
    """Deltas drawn from the model itself: 20,000 coordinates, so that τ² is sharp. A v of 0 takes the equal-weights estimate."""
    rng = np.random.default_rng(1)
    size = 20_000
    common = rng.normal(size=size)
    deltas = np.stack([common + rng.normal(size=size) * np.sqrt(between + v) for v in variances])
    found = random_effects(of(deltas, variances), ["w"], variances)
    assert found.between == pytest.approx(between, rel=0.05, abs=0.35 if not variances[0] else 0.01)


def test_the_weighted_mean_is_nearer_than_the_plain_one() -> None:
    rng = np.random.default_rng(2)
    variances = [0.1, 0.2, 25.0, 100.0]
    common = rng.normal(size=5000)
    deltas = np.stack([common + rng.normal(size=5000) * np.sqrt(0.5 + v) for v in variances])
    weights = np.array([w["w"] for w in noise_aware(of(deltas, variances))])
    fused = (weights[:, None] * deltas).sum(0) / weights.sum()
    error = ((fused - common) ** 2).mean()
    assert error < 0.05 * ((deltas.mean(0) - common) ** 2).mean()
    assert error == pytest.approx(1 / sum(1 / (0.5 + v) for v in variances), rel=0.1)  # the least variance there is


def test_no_noise_means_equal_weights() -> None:
    updates = [update({"w": [1.0, 2.0]}), update({"w": [5.0, -2.0]}), update({"w": [0.0, 9.0]})]
    assert noise_aware(updates) == [{"w": 1.0}] * 3
    same = [update({"w": [1.0]})] * 3
    assert noise_aware(same) == [{"w": 1.0}] * 3  # τ² = 0 and v = 0


def test_equal_noise_means_equal_weights() -> None:
    updates = [update({"w": [float(i)]}, {"w": 3.0}) for i in range(4)]
    assert [w["w"] for w in noise_aware(updates)] == pytest.approx([1.0] * 4)


def test_an_exact_delta_among_noisy_ones_that_agree_decides() -> None:
    updates = [update({"w": [1.0] * 50}, {"w": 0.0}), update({"w": [1.0] * 50}, {"w": 2.0})]
    exact, noisy = (w["w"] for w in noise_aware(updates))
    assert exact == 1.0
    assert 0 < noisy < 1e-3


def test_each_group_of_parameters_has_its_own_weights() -> None:
    """The head has another learning rate, hence another noise, and its own τ²."""
    one = update({"head": [0.0], "encoder": [1.0], "more": [1.0]}, {"head": 1.0, "encoder": 1.0, "more": 1.0})
    two = update({"head": [6.0], "encoder": [1.0], "more": [1.0]}, {"head": 2.0, "encoder": 4.0, "more": 4.0})
    first, second = noise_aware([one, two])
    assert first == {"head": 1.0, "encoder": 1.0, "more": 1.0}
    assert second == pytest.approx({"head": 17.5 / 18.5, "encoder": 0.25, "more": 0.25})


def test_one_update_counts_alone() -> None:
    assert noise_aware([update({"w": [3.0]}, {"w": 5.0})]) == [{"w": 1.0}]
    assert noise_aware([]) == []


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6])), min_size=1, max_size=6))
def test_weights_are_positive_and_at_most_one_whatever_comes(pairs: list[tuple[float, float]]) -> None:
    updates = [update({"w": [x, -x]}, {"w": v}) for x, v in pairs]
    weights = [w["w"] for w in noise_aware(updates)]
    assert max(weights) == 1.0
    assert all(0 < w <= 1 for w in weights)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i][1])
    for i, j in pairwise(order):
        assert weights[i] >= weights[j]


def test_claim_of_tiny_noise_does_not_dominate_the_model() -> None:
    """A stated variance is believed down to a thousandth of the median, and the scatter of the deltas is seen all the same."""
    deltas = np.random.default_rng(0).normal(size=(4, 2000))
    claimed = [1.0, 1.0, 1.0, 1e-18]
    scattered = random_effects(of(5 * deltas, claimed), ["w"], claimed)
    assert scattered.between == pytest.approx(25, rel=0.1)
    assert min(scattered.weights) > 0.9
    agreeing = random_effects(of(np.ones((4, 2000)), claimed), ["w"], claimed)
    assert agreeing.weights == pytest.approx((1e-3, 1e-3, 1e-3, 1.0))
