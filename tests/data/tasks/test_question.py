"""Extractive questions: what a record is, which tokens are labels, losses and gradients one at a time, figures as SQuAD's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset
from cotune.data.metrics.answer_metrics import compute_answer_metrics, judge_answer
from cotune.data.record_reading import read_records
from cotune.data.records import Records
from cotune.data.tasks import question
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.question import QuestionAnswering, _room_around_answer, _windows
from cotune.data.tasks.task import get_task
from cotune.data.types import Question, content_bytes, record_identity
from cotune.errors import ModelError
from cotune.models.base.load import LoadedModel, load_model
from cotune.models.config import ModelConfig
from cotune.models.evaluation.predictor import Predictor
from cotune.models.evaluation.test_set import predict
from cotune.models.trainable import TrainableModel
from tests.support.paired_models import paired_model
from tests.support.questions import questions

__all__ = ["paired_model"]  # fixtures
TASK = QuestionAnswering()
CPU = torch.device("cpu")
Loaded = Callable[..., LoadedModel]


@pytest.fixture
def loaded(base_model: Callable[[str], Path]) -> Loaded:
    def make(kind: str = "bert", length: int = 32) -> LoadedModel:
        config = ModelConfig(base=str(base_model(kind)), max_length=length, precision="float32")
        return load_model(config, (), 3, "question-answering")

    return make


@pytest.fixture(scope="module")
def loaded_once(base_model: Callable[[str], Path]) -> LoadedModel:
    config = ModelConfig(base=str(base_model("bert")), max_length=16, precision="float32")
    return load_model(config, (), 3, "question-answering")


def asked(count: int = 6) -> list[Question]:
    rows = questions(count)
    return [Question(r["question"], r["context"], tuple(r["answers"]), r["context"].index(r["answers"][0])) for r in rows]


def read(file: Path, rows: list[Any], **columns: str) -> Records:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records(DataConfig(source=str(file), **columns), task="question-answering")


# --- records


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("day", (("day",), 4)),
        (["day", "a day"], (("day", "a day"), 4)),
        ({"text": ["day"], "answer_start": [13]}, (("day",), 13)),
        ({"text": ["day"], "answer_start": [3]}, (("day",), 4)),
        ("night", "answer that is not in its context"),
        ({"text": [], "answer_start": []}, "missing answer"),
        (None, "missing answer"),
        (3, "missing answer"),
    ],
)
def test_answer_is_a_part_of_its_context(tmp_path: Path, answers: Any, expected: Any) -> None:
    rows = [{"context": "the day or a day", "question": "when?", "answers": each} for each in ("day", answers)]
    found = read(tmp_path / "questions.jsonl", rows)
    if isinstance(expected, str):
        assert found.skipped == {expected: 1}
    else:
        assert found.inputs[1] == Question("when?", "the day or a day", *expected)


def test_blank_parts_are_left_out_and_columns_have_other_names(tmp_path: Path) -> None:
    rows = [{"c": "a day", "q": question, "a": "day"} for question in ("when?", " ")] + [{"c": "", "q": "when?", "a": "day"}]
    found = read(tmp_path / "questions.jsonl", rows, context="c", question="q", answers="a")
    assert (len(found), found.skipped) == (1, {"blank question": 1, "blank context": 1})


def test_parquet_of_squad_and_csv_are_read(tmp_path: Path) -> None:
    import pandas as pd

    rows = [{"context": "the day", "question": "when?", "answers": {"text": ["day"], "answer_start": [4]}}]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("context,question,answers\nthe day,when?,day\n")
    for name in ("a.parquet", "b.csv"):
        found = read_records(DataConfig(source=str(tmp_path / name)), task="question-answering")
        assert found.inputs == (Question("when?", "the day", ("day",), 4),)


def test_identity_is_of_question_and_context() -> None:
    """Its answers are the label: a corrected one is the same record."""
    one = Question("when?", "the day", ("day",), 4)
    other = Question("When", "the  day", ("the day",), 0)
    assert record_identity(one) == record_identity(other)
    assert content_bytes(one) != content_bytes(other)
    assert record_identity(one) != record_identity(Question("who?", "the day", ("day",), 4))


# --- examples


def test_labels_mark_the_answer_inside_the_context(loaded: Loaded) -> None:
    reader = loaded().reader
    [example] = TASK.examples(reader, 32, [Question("is it", "the great lovely day", ("great lovely",), 4)], [0])
    words = reader.convert_ids_to_tokens(example["input_ids"])
    marked = {word: label for word, label in zip(words, example["labels"], strict=True) if label > 0}
    assert marked == {"great": 1, "lovely": 2}
    assert [word for word, label in zip(words, example["labels"], strict=True) if label != IGNORED] == [
        "the",
        "great",
        "lovely",
        "day",
    ]


def test_types_of_tokens_are_those_that_the_tokenizer_gives(loaded: Loaded) -> None:
    """A model is used with its tokenizer by plain transformers, too, and must read the same there."""
    reader = copy.deepcopy(loaded().reader)
    asked_once = [Question("is it", "the great lovely day", ("great lovely",), 4)]
    [plain] = TASK.examples(reader, 32, asked_once, [0])
    assert plain["types"] == []
    reader.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    [typed] = TASK.examples(reader, 32, asked_once, [0])
    assert typed["types"] == [int(label != IGNORED) for label in typed["labels"]]


def test_answer_that_no_part_holds_contributes_nothing(loaded: Loaded) -> None:
    """And is counted, as is one whose question leaves no room."""
    model = loaded(length=8)
    records = [
        Question("is it", "the day", ("day",), 4),
        Question("is it", "the " * 20 + "day", ("day",), 80),
        Question("is it", "the " * 20 + "day", ("the " * 10 + "the",), 0),
        Question("is " * 30, "the day", ("day",), 4),
    ]
    examples = TASK.examples(model.reader, 8, records, [0] * 4)
    collate = TASK.collator(model.module, model.reader, CPU)
    losses = TASK.losses(model.module, collate(examples, 8, 5))
    assert bool((losses[:2] > 0).all())
    assert losses[2:].tolist() == [0.0] * 3
    assert (TASK.cut(model.reader, 8, records), TASK.lost(model.reader, 8, records)) == (3, 2)


def test_rows_are_chosen_a_few_records_at_a_time(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the parts of all records never exist at once; one that cannot be read has a blank row."""
    model = loaded(length=8)
    records = [*asked(3), Question("is " * 30, "the day", ("day",), 4), Question("is it", "the " * 20 + "day", ("day",), 80)]
    expected = [max(parts, key=_room_around_answer) for parts in TASK.windows(model.reader, 8, records)]
    monkeypatch.setattr(question, "_ENCODED", 2)
    sizes: list[int] = []
    plain = question._encode
    monkeypatch.setattr(question, "_encode", lambda reader, part, most: sizes.append(len(part)) or plain(reader, part, most))
    assert TASK.examples(model.reader, 8, records, [0] * len(records)) == expected
    assert max(sizes) == 2


def test_a_long_context_needs_room_beside_its_question() -> None:
    """Else a context of n tokens would take as many rows; one that fits into the room that is left is read."""
    for length, room in [(384, 47), (64, 7), (64, 0)]:
        asks = [0] * (length - room)
        with pytest.raises(ValueError, match="no room"):
            _windows([*asks, *[1] * 1000], length)
        if room:
            assert len(_windows([*asks, *[1] * room], length)) == 1
    parts = _windows([*[0] * 336, *[1] * 10_000], 384)
    assert sum(map(len, parts)) < 12 * 10_336, "the least room bounds what a record takes"


@given(before=st.integers(1, 9), context=st.integers(0, 90), after=st.integers(0, 2), room=st.integers(1, 40))
def test_parts_cover_a_context_and_overlap_by_a_third(before: int, context: int, after: int, room: int) -> None:
    parts = [None, *[0] * (before - 1), *[1] * context, *[None] * after]
    rows = _windows(parts, before + after + room)
    inside = [[place - before for place in row if parts[place] == 1] for row in rows]
    assert {place for row in inside for place in row} == set(range(context))
    assert all([place for place in row if parts[place] != 1] == [i for i, part in enumerate(parts) if part != 1] for row in rows)
    assert all(row == sorted(row) and len(row) <= before + after + room for row in rows)
    assert len(rows) == 1 or all(len(part) == room for part in inside)
    for start in range(context - room // 3 + 1):
        assert any(set(range(start, start + room // 3)) <= set(part) for part in inside), "an answer of a third is in one of them"


@settings(max_examples=20, deadline=None)
@given(words=st.integers(5, 40), place=st.integers(0, 39))
def test_a_model_trains_on_the_part_with_the_answer(loaded_once: LoadedModel, words: int, place: int) -> None:
    place %= words
    context = ["the"] * words
    context[place] = "lovely"
    text = " ".join(context)
    record = Question("is it", text, ("lovely",), text.index("lovely"))
    reader = loaded_once.reader
    [example] = TASK.examples(reader, 16, [record], [0])
    rows = reader("is it", text, truncation="only_second", max_length=16, stride=4, return_overflowing_tokens=True)["input_ids"]
    assert len(example["input_ids"]) == max(map(len, rows))
    assert [
        reader.convert_ids_to_tokens(i) for i, label in zip(example["input_ids"], example["labels"], strict=True) if label > 0
    ] == ["lovely"]
    inside = [label for label in example["labels"] if label != IGNORED]
    marked = inside.index(3)
    edge = min(place, words - 1 - place)
    assert min(marked, len(inside) - 1 - marked) >= min(edge, len(inside) // 3 // 2), "with as much around it as there is"


def test_first_part_is_what_a_tokenizer_leaves_of_the_record(loaded: Loaded) -> None:
    model = loaded(length=8)
    long = Question("is it", "the great lovely day " * 5, ("day",), 17)
    first, *others = TASK.windows(model.reader, 8, [long])[0]
    assert others
    assert first["input_ids"] == model.reader(long.question, long.context, truncation="only_second", max_length=8)["input_ids"]


def test_answer_is_looked_for_in_all_parts(loaded: Loaded) -> None:
    """Against scores of each part by itself, of long contexts beside short ones; in whichever part the true answer is."""
    model = loaded(length=16)
    records = [Question("is it", " ".join(each.context for each in asked(9)[n:]), ("day",), 0) for n in range(9)]
    predictor = Predictor(TrainableModel(model, None, 3, CPU), (), "question-answering")
    expected = [answer_by_hand(model, record) for record in records]
    assert predictor.answer_texts(records) == expected
    first = [TASK.texts(scores_of(model, rows[0]), rows[:1])[0] for rows in TASK.windows(model.reader, 16, records)]
    assert first != expected, "else a first part is enough"
    judged = [judge_answer(text, ("day",)) for text in expected]
    assert predictor.answers(records) == [(each,) for each in judged]
    records_ = Records(tuple(records), ("",) * 9, "file")
    test = Dataset(((records_, np.arange(len(records))),), (), "question-answering")
    assert predict(predictor.model, {}, test, "float32") == judged


def scores_of(model: LoadedModel, example: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return TASK.scores(model.module, TASK.collator(model.module, model.reader, CPU)([example]))


def answer_by_hand(model: LoadedModel, record: Question) -> str:
    """The pair of a first and a last token with the highest sum of scores, of all that stand in one part."""
    best = (-float("inf"), "")
    for example in TASK.windows(model.reader, model.max_length, [record])[0]:
        [scores] = scores_of(model, example)
        inside = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
        for first in inside:
            for last in range(first, inside[-1] + 1):
                text = record.context[example["offsets"][first][0] : example["offsets"][last][1]]
                best = max(best, (float(scores[first, 0] + scores[last, 1]), text), key=lambda each: each[0])
    return best[1]


# --- losses and gradients


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_losses_are_cross_entropies_over_the_context_one_at_a_time(loaded: Loaded, kind: str) -> None:
    model = loaded(kind)
    reader = copy.deepcopy(model.reader)
    if kind == "bert":
        reader.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    examples = TASK.examples(reader, 32, asked(), [0] * 6)
    together = TASK.losses(model.module, TASK.collator(model.module, reader, CPU)(examples, 32, 8))
    for example, loss in zip(examples, together, strict=False):
        torch.testing.assert_close(loss, loss_by_hand(model, example), rtol=1e-4, atol=1e-5)
    assert together[6:].tolist() == [0.0, 0.0], "slots without a record"


def loss_by_hand(model: LoadedModel, example: dict[str, Any]) -> Tensor:
    """Of one row without padding."""
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([example["input_ids"]])}
    if example["types"]:
        inputs["token_type_ids"] = torch.tensor([example["types"]])
    output = model.module(**inputs)
    inside = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
    first = next(n for n, place in enumerate(inside) if example["labels"][place] & 1)
    last = next(n for n, place in enumerate(inside) if example["labels"][place] & 2)
    each = [
        functional.cross_entropy(scores[:, inside], torch.tensor([place]))
        for scores, place in ((output.start_logits, first), (output.end_logits, last))
    ]
    return (each[0] + each[1]) / 2


def test_padding_reaches_nothing_to_the_bit(loaded: Loaded) -> None:
    model = loaded()
    examples = TASK.examples(model.reader, 32, asked(), [0] * 6)
    collate = TASK.collator(model.module, model.reader, CPU)
    alone = TASK.losses(model.module, collate(examples[:1], 32, 8))[0]
    assert torch.equal(TASK.losses(model.module, collate(examples, 32, 8))[0], alone)


def test_scores_outside_of_the_context_have_no_gradient(loaded: Loaded) -> None:
    scores = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[IGNORED, 0, 1, 2, IGNORED], [IGNORED] * 5])
    TASK.losses_from_scores(scores, labels).sum().backward()
    assert scores.grad is not None
    assert bool((scores.grad[0, 1:4] != 0).all())
    assert scores.grad[0, [0, 4]].tolist() == [[0.0, 0.0]] * 2
    assert bool((scores.grad[1] == 0).all())


# --- answers and figures


def test_text_is_the_best_part_in_order(loaded: Loaded) -> None:
    [example] = TASK.examples(loaded().reader, 32, [Question("is it", "the great lovely day", ("great",), 4)], [0])
    inside = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
    scores = torch.zeros(1, len(example["input_ids"]), 2)
    scores[0, 0] = 9.0  # no part of the context
    scores[0, inside[2], 0] = 5.0
    scores[0, inside[1], 1] = 6.0  # before it
    scores[0, inside[3], 1] = 4.0
    assert TASK.texts(scores, [example]) == ["lovely day"]
    assert TASK.answers(scores, [example]) == [((0.0, 0.0),)]
    assert TASK.answers(scores, [TASK.blank(loaded().reader, 8)]) == [((0.0, 0.0),)]


@pytest.mark.parametrize(
    ("given", "true", "expected"),
    [
        ("the Tall mountain!", ["tall mountain"], (1.0, 1.0)),
        ("tall mountain range", ["tall mountain"], (0.8, 0.0)),
        ("hill", ["tall mountain", "a hill"], (1.0, 1.0)),
        ("", ["hill"], (0.0, 0.0)),
        ("a", ["the"], (1.0, 1.0)),
        ("day day", ["day"], (2 / 3, 0.0)),
    ],
)
def test_figures_are_those_of_squad(given: str, true: list[str], expected: tuple[float, float]) -> None:
    assert judge_answer(given, true) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1, max_size=6))
def test_metrics_are_means(judged: list[tuple[float, float]]) -> None:
    found = compute_answer_metrics(judged)
    assert (found.token_f1, found.exact_answer) == pytest.approx(tuple(np.mean(judged, axis=0)))
    assert get_task("question-answering").read_metrics(found.as_dict()) == found


def test_encoder_with_a_decoder_is_refused(paired_model: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError) as raised:
        load_model(ModelConfig(base=str(paired_model("bart")), max_length=16), (), 3, "question-answering")
    assert raised.value.code == "model.no_question_answering"
