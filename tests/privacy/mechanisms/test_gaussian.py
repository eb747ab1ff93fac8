"""The Gaussian mechanism on a grid: nothing of a sum is left in the low bits, and the noise has the variance that is accounted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cotune.errors import PrivacyError
from cotune.privacy.mechanisms.grid_noise import add_gaussian_noise, choose_grid, grid_step, quantized_clip_norm
from cotune.privacy.mechanisms.random_generators import private_generator

clips = st.sampled_from([1e-3, 0.1, 1.0, 7.3, 100.0])
noises = st.floats(0.3, 1000.0)


@given(clip=clips, noise=noises)
def test_the_step_is_a_power_of_two_far_below_the_noise(clip: float, noise: float) -> None:
    step = grid_step(clip, noise)
    assert math.frexp(step)[0] == 0.5
    assert step <= 2.0**-20 * noise * clip
    assert clip / step <= 2**24  # a clipped entry in steps is a whole number that float32 holds


@given(clip=clips, noise=noises, entries=st.integers(1, 10**7))
def test_a_clipped_vector_is_within_the_clip_norm_once_quantized(clip: float, noise: float, entries: int) -> None:
    """The worst case: every entry is moved by half a step in its own direction."""
    grid = choose_grid(clip, noise, entries)
    assert grid.max_norm + grid.step / 2 * math.sqrt(entries) <= clip
    assert grid.max_norm > 0.99 * clip or entries * noise > 1e6


def test_parameters_too_many_for_rounding_are_refused() -> None:
    with pytest.raises(PrivacyError):
        quantized_clip_norm(1.0, 4.0, 10**14)


@pytest.mark.parametrize("total", [0.0, 1.0, math.pi, -1e3, 1e-9])
def test_everything_that_is_released_is_on_the_grid(total: float) -> None:
    noised = add_gaussian_noise(torch.full((1000,), total, dtype=torch.float64), 1.0, 1.3, private_generator())
    steps = noised / grid_step(1.0, 1.3)
    assert torch.equal(steps, steps.round())


def test_the_noise_is_that_of_the_accounting() -> None:
    """χ² of 10⁶ draws: a standard deviation that is off by 1 % is 14 of its standard errors away."""
    draws = 10**6
    sigma = 1.7
    clip = 0.3
    noised = add_gaussian_noise(torch.zeros(draws, dtype=torch.float64), clip, sigma, np.random.default_rng(1))
    values = noised.numpy() / (sigma * clip)
    assert abs((values**2).sum() - draws) < 6 * math.sqrt(2 * draws)
    assert abs(values.mean()) < 6 / math.sqrt(draws)
    assert stats.kstest(values[:20_000], "norm").pvalue > 1e-4


@pytest.mark.parametrize("shift", [2.0**-30, 1e-7, 0.123456789, 3.0])
def test_two_sums_reach_the_same_values(shift: float) -> None:
    """Rounding the noised sum is the sum of what is rounded: the same noise at another sum is moved by whole steps, exactly."""
    step = grid_step(1.0, 1.0)
    ours = add_gaussian_noise(torch.zeros(1000, dtype=torch.float64), 1.0, 1.0, np.random.default_rng(3))
    others = add_gaussian_noise(torch.full((1000,), shift, dtype=torch.float64), 1.0, 1.0, np.random.default_rng(3))
    moved = set(((others - ours) / step).tolist())
    assert moved == {float(round(shift / step))}


def test_scalars_and_matrices_keep_their_shape() -> None:
    for shape in ((), (3,), (2, 5)):
        total = torch.zeros(shape, dtype=torch.float64)
        noised = add_gaussian_noise(total, 1.0, 1.0, private_generator())
        assert noised.shape == total.shape
        assert not total.any()
