"""Texts with a number: how records are read, what a plan's range does to targets, and the figures against other libraries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from cotune.data.config import DataConfig
from cotune.data.metrics.metrics import compute_number_metrics
from cotune.data.record_reading import read_records
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.regression import Regression
from cotune.data.tasks.task import get_task
from cotune.data.types import get_stratum
from cotune.errors import ModelError
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from tests.support.text_tasks import write_rows

TASK = get_task("regression")
floats = st.floats(-1e6, 1e6)


def test_a_label_is_a_finite_number(tmp_path: Path) -> None:
    labels = [3, "2.50", " -1e3 ", "", None, "good", "nan", "inf", "1e300", True, "0x10"]
    rows = [{"text": f"the day {i}", "label": label} for i, label in enumerate(labels)]
    found = read_records(DataConfig(source=str(write_rows(tmp_path / "a.jsonl", rows))), task="regression")
    assert found.labels == (3.0, 2.5, -1000.0)
    assert found.skipped == {"missing label": 2, "label that is no number": 6}
    assert len({get_stratum(label) for label in found.labels}) == 1, "records are shared out alike, whatever their numbers"


def test_numbers_of_equal_value_are_the_same_label(tmp_path: Path) -> None:
    prints = []
    for i, label in enumerate([3, 3.0, "3.0", "3"]):
        file = write_rows(tmp_path / f"{i}.jsonl", [{"text": "the day", "label": label}])
        prints.append(read_records(DataConfig(source=str(file)), task="regression").fingerprint)
    assert len(set(prints)) == 1


@given(low=floats, width=st.floats(1e-3, 1e6), value=st.floats(-1e9, 1e9))
def test_targets_are_between_minus_one_and_one(low: float, width: float, value: float) -> None:
    task = Regression(low, low + width)
    inside = min(max(value, low), low + width)
    scaled = task.encode_target(value)
    assert -1 - 1e-6 <= scaled <= 1 + 1e-6
    (back,) = task.answers_from_scores(torch.tensor([[scaled]], dtype=torch.float64))
    assert back == pytest.approx(inside, abs=1e-6 * max(1.0, abs(low), width))


def test_a_prediction_that_is_no_number_has_finite_figures() -> None:
    predicted = TASK.answers_from_scores(torch.tensor([[math.nan], [math.inf], [-math.inf], [0.5]]))
    assert all(map(math.isfinite, predicted))
    found = compute_number_metrics([1.0, 2.0, 3.0, 4.0], predicted)
    assert all(map(math.isfinite, found.as_dict().values()))
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()
    assert found.score == 0


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=20))
def test_figures_are_those_of_scipy_and_scikit_learn(pairs: list[tuple[float, float]]) -> None:
    truth, predicted = map(list, zip(*pairs, strict=True))
    found = compute_number_metrics(truth, predicted)
    assert found.mse == pytest.approx(mean_squared_error(truth, predicted))
    assert found.mae == pytest.approx(mean_absolute_error(truth, predicted))
    if np.std(truth) > 1e-3 and np.std(predicted) > 1e-3:
        assert found.r2 == pytest.approx(r2_score(truth, predicted), rel=1e-6, abs=1e-9)
        assert found.spearman == pytest.approx(spearmanr(truth, predicted).statistic, abs=1e-9)


def test_the_constant_answer_is_the_mean() -> None:
    mean = TASK.constant([1.0, 2.0, 6.0], ())
    assert mean == 3.0
    found = compute_number_metrics([1.0, 2.0, 6.0], [mean] * 3)
    assert (found.r2, found.spearman) == (pytest.approx(0.0), 0.0)
    assert compute_number_metrics([2.0, 2.0], [1.0, 3.0]).r2 == 0.0, "nothing varies that could be explained"


def test_a_record_without_a_number_has_no_loss_and_no_gradient() -> None:
    scores = torch.tensor([[0.5], [3.0]], requires_grad=True)
    losses = TASK.losses_from_scores(scores, torch.tensor([0.25, float(IGNORED)]))
    assert losses.tolist() == [0.0625, 0.0]
    losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.5], [0.0]]


def test_a_head_without_a_bias_is_refused(base_model: Callable[[str], Path]) -> None:
    config = ModelConfig(base=str(base_model("gpt2")), max_length=16, precision="float32", target_range=(1.0, 5.0))
    with pytest.raises(ModelError) as raised:
        load_model(config, (), 3, "regression")
    assert raised.value.code == "model.no_regression_head"
