"""The test of drawn noise: silent about honest draws as often as stated, and not about 1 % too little, repeated or other noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cotune.privacy.auditing.drawn_noise import Run, examine

CERTAIN = 1e-8
SHAPES = ((100, 3), (100, 997))  # about 100,000 draws a run


def draws(seed: int, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def accusations(runs: list[Run], error: float = CERTAIN) -> str:
    return "; ".join(examine(runs, error).faults)


def test_honest_noise_is_accused_as_rarely_as_stated() -> None:
    """In 500 tests with 70 % confidence at most 150 times on average; each of the four tests takes a quarter of it."""
    small = ((20, 5), (20, 95))
    accused = sum(bool(accusations([draws(2 * seed, small), draws(2 * seed + 1, small)], 0.3)) for seed in range(500))
    assert accused <= stats.binom.isf(1e-9, 500, 0.3)
    assert accused > 50  # the tests use what is allowed: they are not merely deaf


def test_the_upper_bound_on_the_deviation_is_that_of_chi_squared() -> None:
    found = examine([draws(0)], 0.04)
    square = sum(float((d.astype(float) ** 2).sum()) for d in draws(0))
    assert found.draws == 100_000
    assert found.deviation == pytest.approx((square / 100_000) ** 0.5)
    assert stats.chi2.cdf(square / found.at_most**2, 100_000) == pytest.approx(0.01)
    assert 1 < found.at_most < 1.01


def test_one_percent_too_little_noise_is_seen() -> None:
    wide = ((100, 10_000),)
    assert not accusations([draws(0, wide)])
    assert "too little noise: 0.98" in accusations([[d * 0.985 for d in draws(0)], [d * 0.985 for d in draws(1)]], 1e-3)
    assert "too little noise: 0.99" in accusations([[d * np.float32(0.99) for d in draws(0, wide)]])


def test_more_noise_breaks_no_claim_unless_of_another_shape() -> None:
    assert examine([[d * 1.001 for d in draws(0)]], 0.01).faults == ()


def test_one_parameter_without_noise_is_seen() -> None:
    small, large = draws(0)
    assert "too little noise for parameter 1: 0.0000" in accusations([[small * 0, large]])


@pytest.mark.parametrize(
    "other", [stats.laplace(scale=0.5**0.5), stats.uniform(-(3**0.5), 2 * 3**0.5), stats.t(8, scale=0.75**0.5)]
)
def test_another_shape_of_the_same_variance_is_seen(other: stats.rv_continuous) -> None:
    found = other.rvs(size=(100, 1000), random_state=np.random.default_rng(0))
    assert "the noise is not normal" in accusations([[found]])


def test_noise_on_a_grid_is_normal_enough() -> None:
    step = 2.0**-20
    assert not accusations([[np.round(d.astype(float) / step) * step for d in draws(0)]])


def test_noise_that_is_used_twice_is_seen() -> None:
    small, large = draws(0)
    first = [np.repeat(d[::2], 2, axis=0) for d in (small, large)]
    assert "the noise repeats itself after 1000 draws" in accusations([first])
    halves = [np.concatenate([d[:50], d[:50]]) for d in (small, large)]
    assert "the noise repeats itself after 50000 draws" in accusations([halves])


def test_noise_that_is_drawn_again_in_a_second_run_is_seen() -> None:
    assert "the noise repeats itself after 100000 draws" in accusations([draws(0), draws(0)])
    assert not accusations([draws(0), draws(1)])


def test_one_draw_for_two_parameters_is_seen() -> None:
    _, large = draws(0)
    assert "the noise repeats itself after 997 draws" in accusations([[large, large]])
