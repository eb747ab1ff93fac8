"""Features are looked up among those of a whole file, and nothing of them is copied that is not asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cotune.data.dataset import Dataset
from cotune.data.records import Records
from cotune.models.encoding import FeatureRows, find_features
from cotune.models.features.cached import find_unreadable, get_features
from cotune.models.trainable import TrainableModel

TEXTS = ("great day", "awful", "a tree", "the road")


def rows_of(features: Tensor, places: list[int]) -> FeatureRows:
    chosen = torch.tensor(places, dtype=torch.long)
    return FeatureRows(features, chosen, find_unreadable(features)[chosen])


@given(st.data())
def test_rows_are_those_of_a_copy(data: st.DataObject) -> None:
    """With rows that could not be read in between: those are 0, and no other row depends on them."""
    count = data.draw(st.integers(1, 8))
    unread = data.draw(st.sets(st.integers(0, count - 1)))
    places = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=9))
    asked = data.draw(st.lists(st.integers(0, len(places) - 1), max_size=6))
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    features[sorted(unread), 1] = torch.nan
    found = rows_of(features, places)
    assert torch.equal(found.unreadable, torch.tensor([place in unread for place in places]))
    assert torch.equal(found.copy().isnan(), features[places].isnan())
    target = torch.full((7, 3), 5.0)
    found.copy_into(target, torch.tensor(asked, dtype=torch.long))
    for slot, row in enumerate(asked):
        expected = torch.zeros(3) if places[row] in unread else features[places[row]]
        assert torch.equal(target[slot], expected)
    assert bool((target[len(asked) :] == 5.0).all())


def test_an_infinite_row_does_not_depend_on_unreadable_ones() -> None:
    features = torch.tensor([[torch.inf, 1.0], [torch.nan, 2.0]])
    target = torch.zeros(2, 2)
    rows_of(features, [0, 1]).copy_into(target, torch.tensor([0, 1]))
    assert target.tolist() == [[torch.inf, 1.0], [0.0, 0.0]]


def test_holders_of_one_file_share_its_features(
    shared: Callable[..., TrainableModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path))
    model = shared("bert")
    records = Records(TEXTS, ("good", "bad", "good", "bad"), "memory")
    held = [Dataset(((records, np.array(rows)),), ("good", "bad")) for rows in ([2, 0], [1, 3])]
    one, other = (find_features(each, model, {}, "float32") for each in held)
    assert one.features is other.features
    whole = get_features(model, TEXTS, {}, "float32")
    assert torch.equal(one.copy(), whole[[2, 0]])
    assert torch.equal(other.copy(), whole[[1, 3]])
