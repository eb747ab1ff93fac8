from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cotune.data.partition import PartitionConfig, Rows, partition, split_by_class_shares, split_test
from cotune.errors import DataError
from tests.support.failures import fails_with


def split(labels: list[str], seed: int = 0, **config: Any) -> list[Rows]:
    return partition(labels, PartitionConfig(**config), np.random.default_rng(seed))


def as_lists(parts: list[Rows]) -> list[list[int]]:
    return [part.tolist() for part in parts]


def classes(labels: list[str], part: Rows) -> Counter[str]:
    return Counter(labels[row] for row in part)


def balanced(classes: int, each: int) -> list[str]:
    return [f"c{row % classes}" for row in range(classes * each)]


def label_skew(labels: list[str], parts: list[Rows]) -> float:
    """Mean distance (total variation, 0 to 1) of the clients' label distributions from the pooled one."""
    names = sorted(set(labels))
    pooled = np.array([labels.count(name) for name in names]) / len(labels)
    own = [np.array([classes(labels, part)[name] for name in names]) / len(part) for part in parts]
    return float(np.mean([np.abs(p - pooled).sum() / 2 for p in own]))


SCHEMES = ["iid", "dirichlet:0.05", "dirichlet:0.5", "dirichlet:100", "quantity:0.3", "shards:1", "shards:2"]


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abc"), max_size=60),
    clients=st.integers(1, 6),
    scheme=st.sampled_from(SCHEMES),
    sizes=st.sampled_from(["equal", 0.001, 2.0]),
    minimum=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_are_disjoint_complete_and_large_enough(
    labels: list[str], clients: int, scheme: str, sizes: Any, minimum: int, seed: int
) -> None:
    if scheme.startswith(("dirichlet", "quantity")):
        sizes = "equal"
    config = PartitionConfig(clients=clients, scheme=scheme, sizes=sizes, min_examples=minimum)
    try:
        parts = partition(labels, config, np.random.default_rng(seed))
    except DataError:
        if scheme == "iid" and sizes == "equal":
            assert len(labels) < clients * minimum
        return
    assert len(parts) == clients
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) >= minimum
        assert np.all(np.diff(part) > 0)
    again = partition(labels, config, np.random.default_rng(seed))
    assert as_lists(parts) == as_lists(again)


@pytest.mark.parametrize("scheme", SCHEMES[:1] + SCHEMES[2:5] + SCHEMES[6:])
def test_another_seed_gives_other_parts(scheme: str) -> None:
    labels = balanced(4, 100)
    assert as_lists(split(labels, 1, scheme=scheme)) != as_lists(split(labels, 2, scheme=scheme))


@given(n=st.integers(1, 200), clients=st.integers(1, 12))
def test_iid_sizes_are_equal_to_within_one(n: int, clients: int) -> None:
    if n < clients:
        with pytest.raises(DataError, match=f"{n} examples cannot give {clients} clients 1 each"):
            split(["a"] * n, scheme="iid", clients=clients, min_examples=1)
    else:
        sizes = [len(part) for part in split(["a"] * n, scheme="iid", clients=clients, min_examples=1)]
        assert max(sizes) - min(sizes) <= 1


def test_cuts_fall_where_the_shares_say() -> None:
    """The oracle draws the same shares and rounds their running sums by hand."""
    labels = balanced(3, 40)
    parts = split(labels, 7, scheme="dirichlet:1", clients=3, min_examples=1)
    shares = np.random.default_rng(7).dirichlet([1.0] * 3, size=3)
    for number, name in enumerate(["c0", "c1", "c2"]):
        ends = [round(40 * shares[number][0]), round(40 * (shares[number][0] + shares[number][1])), 40]
        expected = [ends[0], ends[1] - ends[0], ends[2] - ends[1]]
        assert [classes(labels, part)[name] for part in parts] == expected


def test_a_smaller_alpha_skews_labels_more() -> None:
    labels = balanced(5, 200)
    skews = {
        alpha: np.mean([label_skew(labels, split(labels, seed, scheme=f"dirichlet:{alpha}")) for seed in range(5)])
        for alpha in (0.1, 1, 100)
    }
    assert skews[0.1] > 0.45 > 0.35 > skews[1] > 0.15 > 0.06 > skews[100]


def test_dirichlet_gives_unequal_sizes_and_skewed_labels() -> None:
    labels = balanced(5, 200)
    parts = split(labels, scheme="dirichlet:0.5")
    sizes = [len(part) for part in parts]
    assert max(sizes) > 1.5 * min(sizes)
    assert label_skew(labels, parts) > 0.15


@pytest.mark.parametrize("config", [{"scheme": "quantity:0.5"}, {"scheme": "iid", "sizes": 0.5}])
def test_quantity_skews_sizes_and_not_labels(config: dict[str, Any]) -> None:
    labels = balanced(4, 1000)
    parts = split(labels, 3, min_examples=200, **config)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 2 * min(sizes)
    assert label_skew(labels, parts) < 0.06


@settings(deadline=None)
@given(count=st.integers(1, 7), clients=st.integers(1, 9), each=st.integers(1, 7), seed=st.integers(0, 999))
def test_shards_give_each_client_k_classes(count: int, clients: int, each: int, seed: int) -> None:
    labels = balanced(count, 30)
    config: dict[str, Any] = {"scheme": f"shards:{each}", "clients": clients, "min_examples": 1}
    if each > count:
        with fails_with("data.too_few_classes", str(each), str(count)):
            split(labels, seed, **config)
    elif each * clients < count:
        with fails_with("data.too_few_clients", str(clients), str(each * clients), str(count)):
            split(labels, seed, **config)
    else:
        parts = split(labels, seed, **config)
        assert [len(classes(labels, part)) for part in parts] == [each] * clients
        holders = [sum(name in classes(labels, part) for part in parts) for name in set(labels)]
        assert max(holders) - min(holders) <= 1
        for name in set(labels):
            held = [classes(labels, part)[name] for part in parts if name in classes(labels, part)]
            assert max(held) - min(held) <= 1


def test_shards_are_dealt_at_random() -> None:
    labels = balanced(4, 20)
    assert len({tuple(classes(labels, split(labels, seed, scheme="shards:1")[0])) for seed in range(30)}) == 4


def test_shards_may_have_unequal_sizes() -> None:
    labels = balanced(4, 500)
    sizes = [len(part) for part in split(labels, scheme="shards:4", sizes=0.5)]
    assert max(sizes) > 2 * min(sizes)
    lone = split(labels, scheme="shards:1", sizes=0.001, min_examples=500)  # the only holder of a class gets all of it
    assert [len(part) for part in lone] == [500] * 4


def test_shares_are_drawn_again_until_everyone_has_enough() -> None:
    labels = balanced(2, 100)
    few = min(len(part) for part in split(labels, 5, scheme="dirichlet:0.5", min_examples=1))
    enough = split(labels, 5, scheme="dirichlet:0.5", min_examples=few + 10)
    assert min(len(part) for part in enough) >= few + 10


def test_when_nobody_could_have_enough() -> None:
    labels = balanced(2, 50)
    with fails_with("data.too_few_records", "100", "4", "26"):
        split(labels, scheme="iid", min_examples=26)
    with fails_with("data.too_few_records", "dirichlet:0.001", "4"):
        split(labels, scheme="dirichlet:0.001", min_examples=25)
    with fails_with("data.too_few_records", "0"):
        split([], clients=1, min_examples=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scheme": "dirichlt:0.5"}, r"'dirichlt:0.5' is not known; did you mean 'dirichlet:ALPHA'\? Known: "),
        ({"scheme": "random"}, "'random' is not known. Known: dirichlet:ALPHA, iid, quantity:ALPHA, shards:K"),
        ({"scheme": "dirichlet"}, "expected ALPHA, as in 'dirichlet:0.5'"),
        ({"scheme": "quantity:x"}, "has 'x' after the name: expected ALPHA, as in 'quantity:0.5'"),
        ({"scheme": "shards:2.5"}, "has '2.5' after the name: expected a whole number of classes, as in 'shards:2'"),
        ({"scheme": "shards:0"}, "expected K of 1 or more"),
        ({"scheme": "shards:" + "9" * 400}, "expected a whole number of classes"),
        ({"scheme": "iid:1"}, "expected 'iid'"),
        ({"scheme": "dirichlet:0"}, "'dirichlet:0' is out of range: expected ALPHA from 0.001 to 1e[+]06"),
        ({"scheme": "dirichlet:-1"}, "out of range"),
        ({"scheme": "dirichlet:nan"}, "out of range"),
        ({"scheme": "quantity:inf"}, "out of range"),
        ({"scheme": "iid", "sizes": 0}, "sizes=0.0 is out of range"),
        ({"scheme": "quantity:1", "sizes": 1}, "sizes=1.0 was given, but scheme 'quantity:1' draws them"),
        ({"sizes": 1}, "scheme 'dirichlet:0.5' draws them: leave sizes out"),
        ({"clients": 0}, "clients"),
        ({"min_examples": 0}, "min_examples"),
        ({"cliens": 2}, "cliens"),
    ],
)
def test_config_is_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PartitionConfig(**config)


@settings(deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 999),
)
def test_test_split_is_stratified(labels: list[str], fraction: float, seed: int) -> None:
    counts = Counter(labels)
    if max(counts.values()) < 2:
        with pytest.raises(DataError, match="no class among"):
            split_test(labels, fraction, np.random.default_rng(seed))
        return
    train, test = split_test(labels, fraction, np.random.default_rng(seed))
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert train.tolist() == sorted(train)
    assert test.tolist() == sorted(test)
    for name, count in counts.items():
        testing = classes(labels, test)[name]
        if count == 1:
            assert testing == 0
        else:
            assert 1 <= testing <= count - 1
            assert abs(testing - fraction * count) <= 1
    again = split_test(labels, fraction, np.random.default_rng(seed))
    assert [rows.tolist() for rows in again] == [train.tolist(), test.tolist()]


def test_test_split_by_hand() -> None:
    labels = ["a"] * 10 + ["b"] * 5 + ["c"] * 2 + ["d"]
    _, test = split_test(labels, 0.3, np.random.default_rng(0))
    assert classes(labels, test) == {"a": 3, "b": 2, "c": 1}  # 3.0, 1.5 (half up), 0.6; the only d is trained on
    _, other = split_test(labels, 0.3, np.random.default_rng(1))
    assert other.tolist() != test.tolist()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range(fraction: float) -> None:
    with fails_with("plan.test_fraction", "0", "1"):
        split_test(["a", "a"], fraction, np.random.default_rng(0))


def test_nothing_to_test_on() -> None:
    with fails_with("data.too_few_records", "0"):
        split_test([], 0.5, np.random.default_rng(0))


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=30), min_size=1, max_size=6).filter(any),
    st.lists(st.sampled_from("abcd"), max_size=60),
    st.integers(0, 99),
)
def test_further_examples_are_dealt_like_what_is_held(held: list[list[str]], labels: list[str], seed: int) -> None:
    parts = split_by_class_shares(held, labels, np.random.default_rng(seed))
    owned = {name for own in held for name in own}
    assert sorted(row for part in parts for row in part) == [i for i, name in enumerate(labels) if name in owned]
    for own, part in zip(held, parts, strict=True):
        for name in owned:
            share = own.count(name) / sum(each.count(name) for each in held)
            dealt = sum(labels[row] == name for row in part)
            assert dealt == pytest.approx(share * labels.count(name), abs=1.0 + 1e-9)
            assert own.count(name) or not dealt  # nobody is tested on a class that it does not hold
