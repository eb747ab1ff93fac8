from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.strategies import Delta, RoundContext, Update
from cotune.strategies.aggregator import Aggregator
from cotune.strategies.registry import get_builtin_components, infer_component
from tests.support.failures import fails_with

SHAPES = {"a": (3,), "b": (2, 2), "c": ()}


def running() -> Aggregator:
    """The mean, with weights that the updates bring along."""
    weighting = infer_component("weighting", "as told", lambda update: update.disclosures["weight"])
    return Aggregator((weighting, {}), (get_builtin_components("fusion")["mean"], {}), RoundContext())


def update(delta: Delta, weight: float) -> Update:
    return Update("a", 1, delta, examples=1, steps=1, disclosures={"weight": weight})


def fuse(pairs: list[tuple[Delta, float]]) -> Delta:
    mean = running()
    for delta, weight in pairs:
        mean.add(update(delta, weight))
    return mean.result().delta


@st.composite
def rounds(draw: st.DrawFn) -> list[tuple[Delta, float]]:
    """Deltas of some clients, who share different parameters, and their weights."""
    clients: list[tuple[Delta, float]] = []
    for _ in range(draw(st.integers(1, 6))):
        names = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        delta = {name: torch.randn(SHAPES[name], generator=generator) for name in names}
        clients.append((delta, draw(st.floats(1e-3, 1e6))))
    return clients


def test_federated_averaging_by_hand() -> None:
    """(100·[1, 2] + 300·[5, −2]) / 400."""
    fused = fuse([({"w": torch.tensor([1.0, 2.0])}, 100.0), ({"w": torch.tensor([5.0, -2.0])}, 300.0)])
    assert fused["w"].tolist() == [4.0, -1.0]
    assert fused["w"].dtype == torch.float64


def test_a_parameter_is_averaged_over_those_who_sent_it() -> None:
    fused = fuse(
        [
            ({"w": torch.tensor([1.0]), "only-a": torch.tensor([6.0])}, 1.0),
            ({"w": torch.tensor([4.0]), "b-and-c": torch.tensor([1.0])}, 2.0),
            ({"b-and-c": torch.tensor([7.0])}, 4.0),
        ]
    )
    assert {name: d.tolist() for name, d in fused.items()} == {"w": [3.0], "only-a": [6.0], "b-and-c": [5.0]}


def test_one_client_is_its_own_mean() -> None:
    delta = {"w": torch.tensor([0.1, -0.2, 3e-30])}
    assert torch.equal(fuse([(delta, 8.0)])["w"], delta["w"].double())


def test_the_mean_of_nobody_is_nothing() -> None:
    assert fuse([]) == {}


@settings(max_examples=50)
@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(clients: list[tuple[Delta, float]], rng: random.Random) -> None:
    shuffled = rng.sample(clients, len(clients))
    one = fuse(clients)
    other = fuse(shuffled)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


@settings(max_examples=50)
@given(rounds())
def test_streaming_gives_the_mean_of_all_at_once(clients: list[tuple[Delta, float]]) -> None:
    fused = fuse(clients)
    assert fused.keys() == {name for delta, _ in clients for name in delta}
    for name in fused:
        values = [delta[name].double().numpy() for delta, _ in clients if name in delta]
        weights = [weight for delta, weight in clients if name in delta]
        expected = np.average(np.stack(values), axis=0, weights=weights)
        np.testing.assert_allclose(fused[name].numpy(), expected, rtol=1e-9, atol=1e-12)


@given(rounds(), st.floats(1e-3, 1e3))
def test_only_the_ratio_of_weights_matters(clients: list[tuple[Delta, float]], factor: float) -> None:
    one = fuse(clients)
    other = fuse([(delta, weight * factor) for delta, weight in clients])
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


def test_sums_are_kept_in_float64() -> None:
    """In float32 the small delta would be lost beside the large ones."""
    deltas = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert (deltas[0] + deltas[1] + deltas[2]).item() == 0.0
    assert fuse([({"w": d}, 1.0) for d in deltas])["w"].tolist() == [pytest.approx(1 / 3, rel=1e-12)]


def test_many_small_deltas_do_not_fade() -> None:
    """0.1 added 50,000 times in float32 is off by 1e-4 and more."""
    small = torch.tensor([0.1])
    mean = running()
    total = torch.zeros(1)
    for _ in range(20_000):
        mean.add(update({"w": small}, 1.0))
        total += small
    assert abs(total.item() / 20_000 - small.item()) > 1e-6
    assert mean.result().delta["w"].item() == pytest.approx(small.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clients_delta_is_not_changed(dtype: torch.dtype) -> None:
    delta = {"w": torch.ones(2, dtype=dtype)}
    fuse([(delta, 3.0), (delta, 5.0)])
    assert delta["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weight", [-1.0, math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_or_below_0_is_refused(weight: float) -> None:
    with fails_with("run.invalid_weight", "as told"):
        fuse([({"w": torch.ones(1)}, 1.0), ({"w": torch.full((1,), 9.0)}, weight)])


def test_zero_weights_do_not_count_and_all_zero_is_refused() -> None:
    assert fuse([({"w": torch.ones(1)}, 1.0), ({"w": torch.full((1,), 9.0)}, 0.0)])["w"].tolist() == [1.0]
    with fails_with("run.no_weight", "0"):
        fuse([({"w": torch.ones(1)}, 0.0)])
