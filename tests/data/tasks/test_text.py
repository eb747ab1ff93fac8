from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from cotune.data.metrics.metrics import ClassMetrics, compute_metrics, majority_metrics
from cotune.data.tasks.classes import example_losses, logits
from cotune.data.tasks.text import collator, encode
from cotune.models.config import LoraConfig
from cotune.models.trainable import TrainableModel

Make = Callable[..., TrainableModel]
ARCHITECTURES = ("bert", "distilbert", "gpt2", "llama", "qwen2")


def test_score_by_hand() -> None:
    """truth 0 0 0 1 1 2, predicted 0 0 1 1 2 1: precision 1, 1/3, 0; recall 2/3, 1/2, 0; F1 4/5, 2/5, 0."""
    got = compute_metrics([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 1], 3)
    assert astuple(got) == pytest.approx((3 / 6, (1 + 1 / 3) / 3, (2 / 3 + 1 / 2) / 3, (0.8 + 0.4) / 3))
    assert got.as_dict() == pytest.approx({"accuracy": 0.5, "precision": 4 / 9, "recall": 7 / 18, "f1": 0.4})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_score_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = zip(*pairs, strict=True)
    options = {"labels": [0, 1, 2, 3], "average": "macro", "zero_division": 0}
    expected = (
        accuracy_score(truth, predicted),
        *(f(truth, predicted, **options) for f in (precision_score, recall_score, f1_score)),
    )
    assert astuple(compute_metrics(truth, predicted, 4)) == pytest.approx(expected)


def test_a_class_that_never_occurs_counts_as_zero() -> None:
    assert astuple(compute_metrics([0, 0], [0, 0], 2)) == pytest.approx((1.0, 0.5, 0.5, 0.5))


def test_majority_predicts_the_most_frequent_training_class() -> None:
    assert majority_metrics([2, 2, 1], [1, 1, 2, 0], 3) == compute_metrics([1, 1, 2, 0], [2, 2, 2, 2], 3)
    assert majority_metrics([2, 2, 1], [1, 1, 2, 0], 3).accuracy == 0.25
    assert majority_metrics([1, 0, 1, 0], [0, 0, 1], 2).accuracy == pytest.approx(2 / 3)  # a tie: the first class


def test_metrics_are_plain_floats() -> None:
    assert all(type(value) is float for value in astuple(compute_metrics(np.array([0, 1]), np.array([0, 0]), 2)))
    assert type(ClassMetrics(1, 1, 1, 1).as_dict()) is dict


# --- tokens


def test_encode_cuts_off_and_fills_the_empty(shared: Make) -> None:
    tokenizer = shared("bert").loaded.reader
    ids = encode(tokenizer, ["great table", "", "the " * 50, "unheardof"], 8)
    words = tokenizer.get_vocab()
    assert ids == [[words["great"], words["table"]], [0], [words["the"]] * 8, [words["[UNK]"]]]
    assert encode(tokenizer, [], 8) == []


def test_encode_keeps_the_order(shared: Make, texts: tuple[str, ...]) -> None:
    tokenizer = shared("bert").loaded.reader
    assert encode(tokenizer, texts, 32) == [encode(tokenizer, [text], 32)[0] for text in texts]


# --- batches

ROWS = [{"input_ids": [5, 6, 7], "labels": 2}, {"input_ids": [8], "labels": 0}]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_batch_is_padded_and_masked(shared: Make, kind: str) -> None:
    model = shared(kind)
    batch = collator(model.module, model.loaded.reader, model.device)(ROWS)
    pad = model.loaded.reader.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    explicit = {"bert": {"position_ids", "token_type_ids"}, "distilbert": {"position_ids"}, "gpt2": {"position_ids"}}.get(
        kind, set()
    )
    assert set(batch) - {"input_ids", "attention_mask", "labels"} == explicit
    if "position_ids" in explicit:
        assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    if "token_type_ids" in explicit:
        assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_explicit_numbers_equal_the_model_defaults(shared: Make, kind: str) -> None:
    model = shared(kind)
    batch = collator(model.module, model.loaded.reader, model.device)(ROWS)
    with torch.no_grad():
        plain = model.loaded.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits(model.module, batch), plain)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_losses_are_of_each_example_alone(shared: Make, texts: tuple[str, ...], kind: str, adapted: bool) -> None:
    """Also for an empty text, whose one token is padding; cross-entropy is −log softmax, by hand."""
    model = shared(kind, lora=LoraConfig(rank=2) if adapted else None)
    collate = collator(model.module, model.loaded.reader, model.device)
    ids = encode(model.loaded.reader, ["", *texts], 32)
    examples = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(ids)]
    with torch.no_grad():
        together = example_losses(model.module, collate(examples))
        alone = torch.cat([example_losses(model.module, collate([example])) for example in examples])
        first = logits(model.module, collate(examples[:1]))[0].double()
    assert together.shape == (len(examples),)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    expected = -(first[0] - first.exp().sum().log())
    assert float(together[0]) == pytest.approx(float(expected), abs=1e-5)
