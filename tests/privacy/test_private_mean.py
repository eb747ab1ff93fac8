from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cotune.privacy.accounting.composition import Steps
from cotune.privacy.client_dp import PrivateMean, RoundNoise, clip_update
from cotune.strategies.types import Delta, Update
from tests.support.silent_noise import SILENT

SHAPES = {"w": torch.zeros(2, 3), "b": torch.zeros(())}


def noise(z: float = 1.0, bits: float | None = None, expected: float = 1.0) -> RoundNoise:
    return RoundNoise(Steps(z, 1.0, 1), z, bits, expected)


def update(delta: Delta, examples: int = 10) -> Update:
    return Update("a", 1, delta, examples, 1)


def mean(deltas: list[Delta], clip: float, generator: np.random.Generator | None = SILENT, **settings: Any) -> PrivateMean:
    found = PrivateMean(SHAPES, clip, noise(**settings), generator)
    for delta in deltas:
        found.add(update(delta))
    return found


def norm(delta: Delta) -> float:
    return math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in delta.values()))


values = st.floats(-(2.0**90), 2.0**90, width=32)
deltas = st.builds(
    lambda v: {"w": torch.tensor(v[:6]).reshape(2, 3), "b": torch.tensor(v[6])}, st.lists(values, min_size=7, max_size=7)
)


@given(deltas, st.floats(1e-6, 1e6))
def test_clipped_delta_has_norm_c_at_most(delta: dict[str, Tensor], clip: float) -> None:
    found, within = clip_update(delta, clip)
    assert norm(found) <= clip
    assert within == (norm(delta) <= clip)
    if within:
        assert all(torch.equal(found[name], tensor.double()) for name, tensor in delta.items())
    else:
        assert norm(found) == pytest.approx(clip)


@given(st.lists(deltas, max_size=4), deltas, st.floats(1e-3, 1e3))
def test_one_organization_changes_the_sum_by_c_at_most(others: list[Delta], one: Delta, clip: float) -> None:
    """Whatever it sends, and anyone who else takes part: K = 1, so that the mean is the sum."""
    without = mean(others, clip).result()
    with_it = mean([*others, one], clip).result()
    assert norm({n: with_it[n] - without[n] for n in SHAPES}) <= clip * (1 + 1e-9)


@given(deltas, st.integers(1, 10**9))
def test_the_declared_examples_change_nothing(delta: Delta, examples: int) -> None:
    first = PrivateMean(SHAPES, 1.0, noise(), SILENT)
    second = PrivateMean(SHAPES, 1.0, noise(), SILENT)
    first.add(update(delta, 1))
    second.add(update(delta, examples))
    assert all(torch.equal(a, b) for a, b in zip(first.result().values(), second.result().values(), strict=True))


def test_zero_updates_are_fine() -> None:
    found = mean([SHAPES, SHAPES], 1.0, bits=1.0, expected=2.0)
    assert norm(found.result()) == 0.0
    assert found.unclipped == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_clipped_but_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        clip_update({"w": torch.tensor([value, 1.0])}, 1.0)


def test_the_divisor_is_the_expected_number_anyone_who_came() -> None:
    one = {"w": torch.zeros(2, 3), "b": torch.tensor(0.5)}
    assert mean([one], 1.0, expected=4.0).result()["b"].item() == 0.125
    assert mean([one, one], 1.0, expected=4.0).result()["b"].item() == 0.25


@pytest.mark.parametrize(("z", "clip", "expected"), [(1.0, 1.0, 1.0), (2.5, 0.2, 8.0), (0.7, 30.0, 2.5)])
def test_the_noise_has_the_standard_deviation_zc_over_k(z: float, clip: float, expected: float) -> None:
    shapes = {"w": torch.zeros(300, 300), "b": torch.zeros(10_000)}
    found = PrivateMean(shapes, clip, noise(z, expected=expected)).result()
    for tensor in found.values():
        assert float(tensor.std()) == pytest.approx(z * clip / expected, rel=0.03)
        assert abs(float(tensor.mean())) < 5 * z * clip / expected / math.sqrt(tensor.numel())


def test_two_releases_share_no_noise() -> None:
    first = mean([], 1.0, None).result()
    second = mean([], 1.0, None).result()
    assert not torch.equal(first["w"], second["w"])
    assert not torch.equal(first["w"][0], first["w"][1])


def test_a_round_is_released_once() -> None:
    found = mean([], 1.0)
    found.result()
    with pytest.raises(RuntimeError, match="drawn already"):
        found.result()


def test_parameters_that_nobody_sent_get_noise_too() -> None:
    assert set(mean([], 1.0, None).result()) == set(SHAPES)
    assert norm(mean([], 1.0, None).result()) > 0


def test_the_fraction_within_is_shifted_and_noised() -> None:
    """½ + Σ(b − ½)/K: who does not come counts for neither side."""
    small = {"w": torch.zeros(2, 3), "b": torch.tensor(0.5)}
    large = {"w": torch.zeros(2, 3), "b": torch.tensor(5.0)}
    found = mean([small, small, small, large], 1.0, bits=1.0, expected=8.0)
    found.result()
    assert found.unclipped == 0.5 + (1.5 - 0.5) / 8
    draws = []
    for _ in range(2000):
        each = PrivateMean({}, 1.0, noise(1.0, bits=2.0, expected=4.0), np.random.default_rng(len(draws)))
        each.result()
        assert each.unclipped is not None
        draws.append(each.unclipped)
    assert np.mean(draws) == pytest.approx(0.5, abs=0.05)
    assert np.std(draws) == pytest.approx(2.0 / 4, rel=0.06)


def test_with_fixed_clipping_no_fraction_is_released() -> None:
    found = mean([SHAPES], 1.0)
    found.result()
    assert found.unclipped is None


def test_deltas_are_let_go_one_by_one() -> None:
    found = PrivateMean(SHAPES, 1.0, noise(), SILENT)
    seen = []
    for _ in range(3):
        one = update({"w": torch.ones(2, 3), "b": torch.tensor(1.0)})
        seen.append(weakref.ref(one.delta["w"]))
        found.add(one)
        del one
        assert seen[-1]() is None


def test_a_foreign_parameter_is_not_added() -> None:
    with pytest.raises(KeyError):
        PrivateMean(SHAPES, 1.0, noise()).add(update({"other": torch.ones(1)}))


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_a_clip_norm_that_is_none_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="positive clip norm"):
        PrivateMean(SHAPES, clip, noise())
