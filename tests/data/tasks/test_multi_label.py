"""Texts with any number of labels: how they are read, what counts as unknown, and the figures against scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, label_ranking_average_precision_score
from torch.nn import functional

from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset
from cotune.data.metrics.metrics import compute_label_set_metrics
from cotune.data.record_reading import read_records
from cotune.data.records import Records
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.multi_label import MultiLabelClassification
from cotune.data.tasks.task import get_task
from cotune.errors import DataError
from tests.support.text_tasks import write_rows

TASK = get_task("multi-label")
THREE = MultiLabelClassification(3)


def read(file: Path, **columns: Any) -> Records:
    return read_records(DataConfig(source=str(file), **columns), task="multi-label")


def test_labels_are_a_list_or_a_text_with_separators(tmp_path: Path) -> None:
    values = [["good", "so"], ["so", "good", "so"], [], None, "good, so", "", "so"]
    rows = [{"text": f"the day {i}", "label": value} for i, value in enumerate(values)]
    found = read(write_rows(tmp_path / "a.jsonl", rows))
    assert found.labels == (("good", "so"), ("good", "so"), (), (), ("good", "so"), (), ("so",))
    assert found.skipped == {}
    table = tmp_path / "b.csv"
    table.write_text("text,label\nthe day,good|so bad\nthe tree,\n", encoding="utf-8")
    assert read(table, label_separator="|").labels == (("good", "so bad"), ())


def test_targets_are_one_for_each_label_that_is_there() -> None:
    records = Records(("a", "b", "c"), (("so",), (), ("bad", "odd")), "test")
    lenient = Dataset(((records, np.arange(3)),), ("bad", "good", "so"), "multi-label", lenient=True)
    assert lenient.targets == [(0, 0, 1), (0, 0, 0), (IGNORED,) * 3], "one with a label that the plan lacks has no loss"
    assert lenient.truth == [0, 0, 1, 0, 0, 0, *[IGNORED] * 3]
    assert lenient.left_out() == {"label unknown to the plan": 1}
    with pytest.raises(DataError) as raised:
        _ = Dataset(((records, np.arange(3)),), ("bad", "good", "so"), "multi-label").targets
    assert raised.value.code == "data.unknown_class"


def test_losses_are_means_of_binary_cross_entropies() -> None:
    scores = torch.tensor([[0.3, -2.0, 1.0], [5.0, 5.0, 5.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 1.0], [float(IGNORED)] * 3])
    weights = torch.tensor([1.0, 0.5, 2.0])
    losses = THREE.losses_from_scores(scores, labels, weights)
    expected = functional.binary_cross_entropy_with_logits(scores[0], labels[0], weights)
    torch.testing.assert_close(losses, torch.stack([expected, torch.tensor(0.0)]))
    losses.sum().backward()
    assert scores.grad is not None
    assert not scores.grad[1].any()
    assert THREE.are_right(scores, labels).tolist() == [True, True]


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(0, 2**16))
def test_figures_are_those_of_scikit_learn(records: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = (rng.random((records, 3)) < 0.5).astype(int)
    given_ = rng.random((records, 3))
    found = compute_label_set_metrics(truth.ravel().tolist(), given_.ravel().tolist(), 3)
    predicted = (given_ > 0.5).astype(int)
    assert found.micro_f1 == pytest.approx(f1_score(truth, predicted, average="micro", zero_division=0))
    assert found.macro_f1 == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    assert found.exact == pytest.approx(np.mean([(a == b).all() for a, b in zip(truth, predicted, strict=True)]))


def test_average_precision_reads_the_order_alone() -> None:
    truth = [1, 0, 0, 1, 1, 0]
    found = compute_label_set_metrics(truth, [0.04, 0.01, 0.02, 0.04, 0.03, 0.01], 2)
    by_label = np.asarray(truth).reshape(-1, 2).T, np.asarray([0.04, 0.01, 0.02, 0.04, 0.03, 0.01]).reshape(-1, 2).T
    assert found.mean_average_precision == pytest.approx(label_ranking_average_precision_score(*by_label))
    assert compute_label_set_metrics([0, 0], [0.9, 0.1], 2).mean_average_precision == 0.0, "no label is in any record"


def test_the_constant_answer_is_how_often_each_label_is_there() -> None:
    assert TASK.constant([("so",), ("bad", "so"), ()], ("bad", "good", "so")) == (pytest.approx(1 / 3), 0.0, pytest.approx(2 / 3))
