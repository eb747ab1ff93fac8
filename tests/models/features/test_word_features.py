"""The features of records with tags: a vector for each word, of which a head of tags makes what the whole model would tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotune.data.tasks.classes import classes_from_scores, logits
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.features.cached import answer_rows, encode_batch, get_features
from cotune.models.features.head import FeatureHead, feature_head
from cotune.models.trainable import TrainableModel
from tests.support.tiny_models import ARCHITECTURES, counting

WORDS = [("great", "table"), ("the", "table", "is", "very", "sad", "and", "this"), ("awful",), ("of", "the", "tree")]
LONGEST = 8


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tagger(base_model: Callable[[str], Path]) -> Callable[[str], TrainableModel]:
    def make(kind: str) -> TrainableModel:
        config = ModelConfig(base=str(base_model(kind)), max_length=LONGEST)
        model = TrainableModel(load_model(config, ("A", "B", "O"), 1, "token-classification"), None, 1, torch.device("cpu"))
        model.load({})
        return model

    return make


def head_of(model: TrainableModel) -> FeatureHead:
    found = feature_head(model)
    assert found is not None
    return found


@torch.no_grad()
def whole(model: TrainableModel, words: Any) -> Tensor:
    """The scores of each word by the whole model, one text at a time; NaN for those that it does not read."""
    task = model.loaded.task
    reader = model.loaded.reader
    (example,) = task.examples(reader, LONGEST, [words], [(0,) * len(words)])
    batch = task.collator(model.module, reader, model.device)([example])
    return task.answer_scores(logits(model.module, batch), [example])[0]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_head_on_word_features_gives_the_models_scores(tagger: Callable[[str], TrainableModel], kind: str) -> None:
    model = tagger(kind)
    vectors = get_features(model, WORDS, {}, "float32")
    assert len(vectors) == sum(map(len, WORDS))
    with torch.no_grad():
        scores = head_of(model)(vectors).logits
    expected = torch.cat([whole(model, words) for words in WORDS])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_a_word_that_is_cut_off_has_no_vector_and_no_answer(tagger: Callable[[str], TrainableModel]) -> None:
    model = tagger("bert")  # reads eight words
    vectors = get_features(model, [("the",) * 10, ("tree",)], {}, "float32")
    unread = vectors.isnan().any(dim=1).tolist()
    assert unread == [False] * 8 + [True] * 2 + [False]
    with torch.no_grad():
        predicted = classes_from_scores(head_of(model)(vectors).logits)
    assert (predicted == -1).tolist() == unread


def test_token_beyond_the_table_drops_its_record_alone(tagger: Callable[[str], TrainableModel]) -> None:
    model = tagger("bert")
    task = model.loaded.task
    examples = task.examples(model.loaded.reader, LONGEST, WORDS, [(0,) * len(words) for words in WORDS])
    examples[1]["input_ids"][2] = 10**6
    rows = answer_rows(WORDS)
    vectors = encode_batch(model, examples, "float32")
    as_they_are = get_features(model, WORDS, {}, "float32")
    assert vectors[list(rows[1])].isnan().all()
    assert torch.equal(vectors[list(rows[2])], as_they_are[list(rows[2])])


def test_they_are_kept_and_computed_once(tagger: Callable[[str], TrainableModel]) -> None:
    model = tagger("bert")
    first = get_features(model, WORDS, {}, "float32")
    with counting(model) as calls:
        again = get_features(model, WORDS, {}, "float32")
    assert calls == []
    assert torch.equal(first.nan_to_num(), again.nan_to_num())


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(others=st.lists(st.sampled_from(["the", "great", "sad", "tree", "table"]), min_size=1, max_size=12))
def test_a_records_vectors_are_the_same_bits_in_any_company(tagger: Callable[[str], TrainableModel], others: list[str]) -> None:
    model = tagger("bert")
    alone = get_features(model, [WORDS[1]], {}, "float32")
    beside = get_features(model, [tuple(others), WORDS[1]], {}, "float32")[len(others) :]
    assert torch.equal(alone.nan_to_num(), beside.nan_to_num())


def test_rows_of_answers_are_one_after_the_other() -> None:
    assert answer_rows(["a text", ("two", "words"), "another"]) == [range(1), range(1, 3), range(3, 4)]
