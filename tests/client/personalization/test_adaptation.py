from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotune.client.personalization.adaptation import OwnRecords, adapt, build_own_records, load_base_head, split_folds
from cotune.models.config import ModelConfig
from cotune.models.features.head_fit import fit_head, head_scores
from cotune.models.trainable import State, TrainableModel, get_model
from cotune.plan.tables import PersonalizeConfig
from tests.support.failures import fails_with

POINTS = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(base_model: Callable[[str], Path]) -> TrainableModel:
    config = ModelConfig(base=str(base_model("bert")), max_length=16, pooling="mean")
    return get_model(config, ("bad", "good", "so"), None, 7, "cpu")


def records(count: int, seed: int = 0, mix: tuple[float, ...] = (1, 1, 1)) -> OwnRecords:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(torch.tensor(mix, dtype=torch.float64), count, replacement=True, generator=generator)
    features = POINTS[targets] + 2 * torch.randn(count, 16, generator=generator)
    return build_own_records(features, targets.tolist(), range(count), 3)


def shared_head(model: TrainableModel, own: OwnRecords) -> State:
    start = load_base_head(model)
    return fit_head(model, own.features, own.targets, start=start, toward=start, pull=0.001)


def accuracy(model: TrainableModel, head: State, of: OwnRecords) -> float:
    predicted: Tensor = head_scores(model, head, of.features).argmax(dim=1)
    return float((predicted == of.targets).float().mean())


def test_few_skewed_records_keep_part_of_the_shared_model(model: TrainableModel) -> None:
    """Thirty records of another mix: better than the shared model as it came, and better than alone."""
    mix = (6.0, 1.0, 1.0)
    shared = shared_head(model, records(2000, seed=2))
    new = records(4000, seed=9, mix=mix)
    gains = []
    for seed in range(3):
        found = adapt(model, records(30, seed=20 + seed, mix=mix), shared, PersonalizeConfig(folds=3), seed=1)
        assert accuracy(model, found.head, new) > accuracy(model, shared, new)
        gains.append(accuracy(model, found.head, new) - accuracy(model, found.alone, new))
    assert sum(gains) / len(gains) > 0.02


def test_a_shared_model_that_knows_nothing_is_not_kept(model: TrainableModel) -> None:
    own = records(300, seed=3)
    new = records(2000, seed=9)
    wrong = {name: -tensor for name, tensor in shared_head(model, records(500, seed=4)).items()}
    found = adapt(model, own, wrong, PersonalizeConfig(folds=2), seed=1)
    assert found.method != "federated"
    assert accuracy(model, found.head, new) > accuracy(model, found.alone, new) - 0.03


def test_only_the_methods_of_the_plan_are_kept(model: TrainableModel) -> None:
    wrong = {name: -tensor for name, tensor in shared_head(model, records(500, seed=4)).items()}
    for methods in ((), ("prior",), ("head", "mix")):
        found = adapt(model, records(100, seed=3), wrong, PersonalizeConfig(methods=methods, folds=2), seed=1)
        assert found.method in ("federated", *methods)
        assert set(found.tried) == {"federated", *methods}
        if not methods:
            assert all(torch.equal(found.head[name], wrong[name]) for name in wrong)


def test_the_same_records_give_the_same_head(model: TrainableModel) -> None:
    shared = shared_head(model, records(500, seed=4))
    one, other = (adapt(model, records(60, seed=3), shared, PersonalizeConfig(folds=2), seed=1) for _ in range(2))
    assert one.described == other.described
    assert all(torch.equal(one.head[name], other.head[name]) for name in one.head)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=2, max_size=60), st.integers(2, 6))
def test_records_of_one_unit_are_in_one_part(drawn: list[tuple[int, int]], folds: int) -> None:
    units, targets = zip(*drawn, strict=True)
    if len(set(units)) < 2:
        return
    own = OwnRecords(torch.arange(len(units)).float()[:, None], torch.tensor(targets), np.arange(len(units)), np.asarray(units))
    found = list(split_folds(own, folds, seed=3))
    judged = [int(row) for _, judge in found for row in judge.features[:, 0]]
    assert sorted(judged) == list(range(len(units)))  # every record judges once
    for train, judge in found:
        assert not set(train.units.tolist()) & set(judge.units.tolist())
        assert len(train.units) + len(judge.units) == len(units)


def test_records_that_cannot_be_used_are_left_out() -> None:
    features = torch.ones(4, 2)
    features[1] = torch.nan
    assert build_own_records(features, [0, 1, -100, 2], [5, 6, 7, 8], 3).units.tolist() == [5, 8]
    with fails_with("data.too_few_records", "1"):
        build_own_records(features, [0, 1, -100, 7], [5, 6, 7, 8], 3)
