"""What travels of predictions, and what is learned from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cotune.ensembles.public_inputs import find_extreme_score, read_inputs, to_shared, to_taught
from cotune.errors import DataError
from cotune.plan.public import PublicConfig
from tests.support.datasets import sentences, write_csv

SCORES = PublicConfig(source="public.csv", max_score=5.0)
VOTES = PublicConfig(source="public.csv", share="votes")
numbers = st.floats(-30, 30, allow_nan=False)


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    rows = draw(st.integers(1, 6))
    classes = draw(st.integers(2, 5))
    values = draw(st.lists(numbers, min_size=rows * classes, max_size=rows * classes))
    return torch.tensor(values, dtype=torch.float64).reshape(rows, classes)


@given(tables(), st.floats(-100, 100))
def test_shared_scores_are_bounded_and_blind_to_a_shift(scores: Tensor, shift: float) -> None:
    shared = to_shared(scores, SCORES)
    assert shared.dtype == torch.float32
    assert bool((shared.abs() <= 5).all())
    assert shared == pytest.approx(to_shared(scores + shift, SCORES), abs=1e-5)


@given(tables())
def test_scores_within_the_bound_stand_for_their_softmax(scores: Tensor) -> None:
    wide = PublicConfig(source="public.csv", max_score=100.0)
    taught = to_taught(to_shared(scores, wide), wide)
    said = ~taught.isnan().any(dim=1)
    assert taught[said] == pytest.approx(functional.softmax(scores, dim=1)[said], abs=1e-5)


@given(tables())
def test_votes_name_the_most_probable_class(scores: Tensor) -> None:
    shared = to_shared(scores, VOTES)
    assert torch.equal(shared.argmax(dim=1), scores.argmax(dim=1))
    assert shared.sum(dim=1).tolist() == [1.0] * len(scores)
    assert torch.equal(to_taught(shared, VOTES), shared.double())


@pytest.mark.parametrize("public", [SCORES, VOTES])
def test_unread_inputs_say_nothing(public: PublicConfig) -> None:
    shared = to_shared(torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]), public)
    assert shared[1].tolist() == [0.0, 0.0]
    taught = to_taught(shared, public)
    assert taught.isnan().any(dim=1).tolist() == [False, True]


def test_shares_of_votes_add_up_to_one() -> None:
    fused = torch.tensor([[0.25, 0.25, 0.0], [0.0, -0.1, 0.6]])  # half have abstained; a rule may give less than 0
    assert to_taught(fused, VOTES).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]


def test_predictions_beyond_the_bound_are_found() -> None:
    received = torch.tensor([[4.0, -4.0]])
    assert find_extreme_score(received, torch.tensor([[1.0, -1.0]]), SCORES) is None
    assert find_extreme_score(received, torch.tensor([[1.5, 0.0]]), SCORES) == pytest.approx(5.5)
    assert find_extreme_score(received, torch.tensor([[0.0, -1.5]]), SCORES) == pytest.approx(5.5)


@given(tables(), st.floats(0, 1))
def test_honest_predictions_are_within_the_bound_in_bfloat16(scores: Tensor, share: float) -> None:
    shared = to_shared(scores, SCORES)
    received = share * to_shared(scores.flip(0), SCORES)
    travels = (shared - received).bfloat16().float()
    assert find_extreme_score(received, travels, SCORES) is None


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "public.csv", sentences(5, seed=1))
    for changes in ({"sha256": "0" * 64}, {"answers": 4}):
        with pytest.raises(DataError) as caught:
            read_inputs(PublicConfig(source="public.csv", **changes), "sequence-classification", file)
        assert caught.value.code == "data.changed"
