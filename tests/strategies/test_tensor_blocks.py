"""Arithmetic by blocks against the formulas on whole tensors in float64, and updates that are held on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotune.errors import RunError
from cotune.strategies import (
    RoundContext,
    StrategyConfig,
    Update,
    WeightedUpdate,
    apply_delta,
    norm,
    update_store,
    weighted,
    weighted_mean,
)
from cotune.strategies.aggregator import Aggregator, build_aggregator
from cotune.strategies.conformance.samples import complete, sample
from cotune.strategies.order_statistics import sort_rows
from cotune.strategies.registry import get_builtin_components, infer_component
from cotune.strategies.sums import add_weighted, divide, total
from cotune.strategies.tensor_blocks import BLOCK, is_finite
from cotune.strategies.update_store import HeldUpdates

SHAPES = {"embedding": (300, 700), "bias": (7,), "scalar": (), "nothing": (0, 3)}  # the first is longer than three blocks


def updates(count: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Update(f"org-{k}", 1, {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}, 10 + 7 * k, 1)
        for k in range(count)
    ]


def stacked(sent: Sequence[Update], name: str) -> Tensor:
    """(n, *shape) in float64, as a formula on whole tensors has it."""
    return torch.stack([update.delta[name].double() for update in sent])


def play(fusion: str, sent: Sequence[Update], folder: Path | None = None) -> dict[str, Tensor]:
    strategy = StrategyConfig.model_validate({"fusion": fusion})
    combination = build_aggregator(strategy, RoundContext(), folder)
    for update in sent:
        combination.add(update)
    return dict(combination.result().delta)


def whole_mean(sent: Sequence[Update], name: str) -> Tensor:
    found = sent[0].delta[name].double() * float(sent[0].examples)
    for update in sent[1:]:
        found += update.delta[name].double() * float(update.examples)
    return found / sum(update.examples for update in sent)


def whole_median(sent: Sequence[Update], name: str) -> Tensor:
    ordered = stacked(sent, name).sort(dim=0).values
    return (ordered[(len(sent) - 1) // 2] + ordered[len(sent) // 2]) / 2


def whole_trimmed_mean(sent: Sequence[Update], name: str) -> Tensor:
    cut = len(sent) // 5
    return stacked(sent, name).sort(dim=0).values[cut : len(sent) - cut].mean(dim=0)


def whole_krum(sent: Sequence[Update], name: str) -> Tensor:
    rows = torch.stack([torch.cat([tensor.double().flatten() for tensor in update.delta.values()]) for update in sent])
    squares = (rows[:, None] - rows).pow(2).sum(dim=2)
    nearest = squares.sort(dim=1).values[:, 1 : len(sent) - 2].sum(dim=1)  # n − f − 2 of them, without itself
    return sent[int(nearest.argmin())].delta[name].double()


def whole_ties(sent: Sequence[Update], name: str) -> Tensor:
    kept = []
    for update in sent:
        sizes = torch.cat([tensor.double().flatten() for tensor in update.delta.values()]).abs()
        keep = round(0.2 * len(sizes))
        smallest = sizes.kthvalue(len(sizes) - keep + 1).values
        tensor = update.delta[name].double()
        kept.append(torch.where(tensor.abs() >= smallest, tensor, 0.0))
    weights = torch.tensor([float(update.examples) for update in sent]).double().reshape(-1, *[1] * kept[0].dim())
    deltas = torch.stack(kept)
    sign = (weights * deltas).sum(dim=0).sign()
    agreed = weights * ((deltas.sign() == sign) & (sign != 0))
    weight = agreed.sum(dim=0)
    return torch.where(weight > 0, (agreed * deltas).sum(dim=0) / weight, 0.0)


WHOLE: dict[str, Callable[[Sequence[Update], str], Tensor]] = {
    "mean": whole_mean,
    "median": whole_median,
    "trimmed_mean": whole_trimmed_mean,
    "krum": whole_krum,
    "ties": whole_ties,
}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("fusion", WHOLE)
def test_fusions_by_blocks_are_those_of_whole_tensors_to_the_bit(
    fusion: str, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_store, "_IN_MEMORY", 0)
    for count in (5, 8):
        sent = updates(count)
        found = play(fusion, sent, tmp_path if on_disk else None)
        for name in SHAPES:
            assert torch.equal(found[name], WHOLE[fusion](sent, name)), (name, count)
            assert found[name].dtype == torch.float64


@pytest.mark.parametrize("fusion", WHOLE)
def test_fusions_of_many_updates_are_those_of_whole_tensors(fusion: str) -> None:
    """Sums of more rows than torch adds one after the other differ in their last digits."""
    sent = updates(40, {"x": (50, 40)})
    torch.testing.assert_close(play(fusion, sent)["x"], WHOLE[fusion](sent, "x"), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("fusion", [name for name, info in get_builtin_components("fusion").items() if not info.needs.adapters])
def test_held_on_disk_or_in_memory_is_the_same_to_the_bit(fusion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_store, "_IN_MEMORY", 0)
    info = get_builtin_components("fusion")[fusion]
    parameters = info.check(complete(info))
    case = sample(info, parameters)
    found = []
    for folder in (None, tmp_path):
        combination = Aggregator((get_builtin_components("weighting")["examples"], {}), (info, parameters), case.context, folder)
        for update in case.updates:
            combination.add(update)
        found.append((combination.result().delta, combination.summarize_updates()))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 30), columns=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_columns_are_sorted_whatever_their_number(rows: int, columns: int, seed: int) -> None:
    entries = np.random.default_rng(seed).integers(-3, 4, (rows, columns)).astype(np.float32)
    assert np.array_equal(sort_rows(entries.copy()), np.sort(entries, axis=0))


def test_every_network_sorts_all_zeros_and_ones() -> None:
    """Which is enough: a network that sorts all of them sorts everything (Knuth, volume 3, theorem 5.3.4Z)."""
    for count in range(2, 13):
        patterns = (np.arange(2**count)[None, :] >> np.arange(count)[:, None] & 1).astype(np.float32)
        assert np.array_equal(sort_rows(patterns.copy()), np.sort(patterns, axis=0)), count


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 3 * BLOCK // 2), min_size=1, max_size=3), count=st.integers(1, 4), seed=st.integers(0, 99))
def test_streamed_sum_is_bit_equal_to_the_whole_sum(sizes: list[int], count: int, seed: int) -> None:
    sent = updates(count, {str(i): (size,) for i, size in enumerate(sizes)}, seed)
    whole: dict[str, Tensor] = {}
    streamed: dict[str, Tensor] = {}
    for update in sent:
        weighed = WeightedUpdate(update, update.examples / 3)
        total(whole, weighted(weighed))
        square = add_weighted(streamed, weighed)
        exact = math.fsum(float(x) ** 2 for tensor in update.delta.values() for x in tensor.tolist())
        assert square == pytest.approx(exact, rel=1e-13)
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in whole.items())
    expected = weighted_mean(whole)
    found = divide(dict(streamed))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_in_any_block(wrong: float, tmp_path: Path) -> None:
    for place in (0, BLOCK, 3 * BLOCK):
        values = torch.zeros(3 * BLOCK + 1)
        values[place] = wrong
        assert not is_finite({"x": values}, "x")
        for fusion in ("mean", "median"):
            combination = build_aggregator(StrategyConfig.model_validate({"fusion": fusion}), RoundContext(), tmp_path)
            with pytest.raises(RunError) as error:
                combination.add(Update("org", 1, {"x": values}, 10, 1))
            assert error.value.code == "run.update_not_finite"


def test_float64_norms_are_finite_though_squares_overflow() -> None:
    assert is_finite({"x": torch.full((3,), 1e300, dtype=torch.float64)}, "x")
    assert norm({"x": torch.full((3,), 1e300, dtype=torch.float64)}) == math.inf


def test_updates_on_disk_are_read_as_they_came_and_leave_nothing(tmp_path: Path) -> None:
    sent = updates(3, {"large": (1200, 1000), "nothing": (0,), "one": ()})
    collection = HeldUpdates(tmp_path / "inbox")
    for update in sent:
        collection.add(update)
    assert list((tmp_path / "inbox").iterdir()) == []  # a file without a name
    for kept, update in zip(collection.updates, sent, strict=True):
        assert kept.organization == update.organization
        assert list(kept.delta) == list(update.delta)
        assert all(torch.equal(kept.delta[name], tensor) for name, tensor in update.delta.items())
        assert norm(kept.delta) == norm(update.delta)
        kept.delta["large"].fill_(0.0)  # a rule of one's own may do so: the file stays as it is
    assert all(norm(kept.delta) == norm(update.delta) for kept, update in zip(collection.updates, sent, strict=True))
    collection.clear()
    assert collection.updates == []


def test_small_updates_stay_in_memory(tmp_path: Path) -> None:
    collection = HeldUpdates(tmp_path / "inbox")
    for update in updates(4, {"head": (10, 10)}):
        collection.add(update)
    assert not (tmp_path / "inbox").exists()


def test_deltas_of_any_dtype_and_layout_fuse_alike(tmp_path: Path) -> None:
    plain = updates(5, {"x": (6, 4)})
    shapes = [lambda t: t.double(), lambda t: t.T.contiguous().T, lambda t: t, lambda t: t.bfloat16(), lambda t: t.half()]
    mixed = [
        Update(u.organization, 1, {"x": change(u.delta["x"])}, u.examples, 1) for u, change in zip(plain, shapes, strict=True)
    ]
    for fusion in ("mean", "median", "ties"):
        expected = WHOLE[fusion](mixed, "x")
        torch.testing.assert_close(play(fusion, mixed)["x"], expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_step_is_rounded_once(rate: float) -> None:
    state = {"x": torch.randn(300, 400), "kept": torch.ones(2)}
    delta = {"x": torch.randn(300, 400, dtype=torch.float64) * 1e-3}
    moved = apply_delta(state, delta, rate)
    assert torch.equal(moved["x"], (state["x"].double() + delta["x"] * rate).float())
    assert moved["kept"] is state["kept"]


def test_an_update_on_disk_may_be_the_result_of_a_rule(tmp_path: Path) -> None:
    def first(updates: Sequence[WeightedUpdate]) -> Mapping[str, Tensor]:
        return updates[0].update.delta

    sent = updates(2, {"x": (1300, 1000)})
    uniform = (get_builtin_components("weighting")["uniform"], {})
    combination = Aggregator(uniform, (infer_component("fusion", "first", first), {}), RoundContext(), tmp_path)
    for update in sent:
        combination.add(update)
    assert torch.equal(combination.result().delta["x"], sent[0].delta["x"])
