from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from cotune.data.records import Records
from cotune.data.tasks.classes import example_losses, logits
from cotune.data.tasks.task import get_task
from cotune.models.base.load import LoadedModel, load_model
from cotune.models.config import ModelConfig
from cotune.models.features.head import feature_head
from cotune.models.trainable import TrainableModel
from tests.support.failures import fails_with
from tests.support.tiny_models import ARCHITECTURES

TASK = get_task("token-classification")
LABELS = ("B-X", "I-X", "O")


def word_pieces(side: str = "right") -> PreTrainedTokenizerFast:
    """un | ##happ | ##y: words of one to three pieces, between [CLS] and [SEP]."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##happ", "##y", "a", "day", "##s", ",", "york", "new"]
    made = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", truncation_side=side
    )


def examples(words: list[list[str]], tags: list[list[int]], length: int = 32) -> list[dict[str, Any]]:
    return TASK.examples(word_pieces(), length, [tuple(w) for w in words], [tuple(t) for t in tags])


# --- alignment


def test_the_first_piece_of_a_word_has_its_tag() -> None:
    (got,) = examples([["unhappy", "days", ",", "a"]], [[0, 1, 2, 2]])
    assert got["input_ids"] == [2, 4, 5, 6, 8, 9, 10, 7, 3]
    assert got["labels"] == [-100, 0, -100, -100, 1, -100, 2, 2, -100]
    assert got["starts"] == [1, 4, 6, 7]


def test_words_that_are_cut_off_have_no_place() -> None:
    (got,) = examples([["unhappy", "days", "a"]], [[0, 1, 2]], 5)
    assert got["input_ids"] == [2, 4, 5, 6, 3]
    assert got["labels"] == [-100, 0, -100, -100, -100]
    assert got["starts"] == [1, None, None]


def test_a_word_may_hold_a_space_or_punctuation() -> None:
    (got,) = examples([["new york", "a,day", "day"]], [[0, 1, 2]])
    assert [word_pieces().convert_ids_to_tokens(i) for i in got["input_ids"]] == [
        "[CLS]",
        "new",
        "york",
        "a",
        ",",
        "day",
        "day",
        "[SEP]",
    ]
    assert got["starts"] == [1, 3, 6]


def test_word_dropped_by_the_tokenizer_shifts_no_other() -> None:
    (got,) = examples([["a", "\x0b", "day"]], [[0, 1, 2]])
    assert got["starts"][0] == 1
    assert got["labels"][got["starts"][2]] == 2


def test_no_records_no_examples() -> None:
    assert examples([], []) == []


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_family_reads_words_as_in_running_text(base_model: Callable[[str], Path], kind: str) -> None:
    """A word's first token is one of its own, whatever the tokenizer does with spaces."""
    reader = TASK.reader(base_model(kind))
    words = ("the", "table", "is", "great")
    (got,) = TASK.examples(reader, 64, [words], [(2, 0, 2, 1)])
    assert got["input_ids"] == reader(" ".join(words))["input_ids"]
    offsets = reader(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
    text = " ".join(words)
    begins = [0, 4, 10, 13]
    assert [text[max(offsets[s][0], b) : offsets[s][1]][0] for s, b in zip(got["starts"], begins, strict=True)] == [
        "t",
        "t",
        "i",
        "g",
    ]
    assert [got["labels"][s] for s in got["starts"]] == [2, 0, 2, 1]
    assert sum(label != -100 for label in got["labels"]) == 4


# --- losses and answers


def loaded(base_model: Callable[[str], Path], kind: str) -> LoadedModel:
    return load_model(ModelConfig(base=str(base_model(kind)), precision="float32"), LABELS, 1, "token-classification")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_loss_of_an_example_is_the_mean_over_its_own_words(base_model: Callable[[str], Path], kind: str) -> None:
    model = loaded(base_model, kind)
    rows = TASK.examples(
        model.reader, 64, [("the", "great", "day"), ("road",), ("a", "sad", "tree", "it")], [(2, 0, 1), (1,), (2, 0, 2, 2)]
    )
    collate = TASK.collator(model.module, model.reader, torch.device("cpu"))
    with torch.no_grad():
        together = example_losses(model.module, collate(rows))
        for row, got in zip(rows, together.tolist(), strict=True):
            (scores,) = logits(model.module, collate([row]))
            by_hand = [float(functional.cross_entropy(scores[s], torch.tensor(row["labels"][s]))) for s in row["starts"]]
            assert got == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
        weights = torch.tensor([0.5, 3.0, 7.0])
        weighted = example_losses(model.module, collate(rows), weights).tolist()
        for row, got in zip(rows, weighted, strict=True):
            (scores,) = logits(model.module, collate([row]))
            tags = [row["labels"][s] for s in row["starts"]]
            by_hand = [
                float(weights[tag] * functional.cross_entropy(scores[s], torch.tensor(tag)))
                for s, tag in zip(row["starts"], tags, strict=True)
            ]
            assert got == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)


def test_an_example_without_a_labeled_word_has_no_loss(base_model: Callable[[str], Path]) -> None:
    model = loaded(base_model, "bert")
    batch = TASK.collator(model.module, model.reader, torch.device("cpu"))(
        [{"input_ids": [5, 6], "labels": [-100, -100], "starts": []}]
    )
    assert example_losses(model.module, batch).tolist() == [0.0]


def test_answers_are_those_at_the_first_pieces() -> None:
    scores = torch.zeros(2, 4, 3)
    scores[0, 1, 2] = scores[0, 3, 1] = scores[1, 0, 2] = 1.0
    assert TASK.answers(scores, [{"starts": [1, 3]}, {"starts": [0, None]}]) == [(2, 1), (2, -1)]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_vector_of_each_word_is_what_the_head_reads(base_model: Callable[[str], Path], kind: str) -> None:
    head = feature_head(TrainableModel(loaded(base_model, kind), None, 1, torch.device("cpu")))
    assert head is not None
    assert head.reads_words


# --- records


def read(path: Path, **config: Any) -> Records:
    return read_records(DataConfig(source=str(path), **config), task="token-classification")


def test_lists_of_words_and_tags(tmp_path: Path) -> None:
    rows = [(["New", "York", "is"], ["B-LOC", "I-LOC", "O"]), (["so", "1", "3.5"], ["O", "O", "O"])]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": w, "label": t}) for w, t in rows))
    pq.write_table(pa.table({"text": [w for w, _ in rows], "label": [t for _, t in rows]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{' '.join(w)},{' '.join(t)}\n" for w, t in rows))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{' '.join(w)}\t {'  '.join(t)}\n" for w, t in rows))
    found = [read(tmp_path / f"a.{suffix}") for suffix in ("jsonl", "parquet", "csv", "tsv")]
    for records in found:
        assert records.inputs == tuple(tuple(w) for w, _ in rows)
        assert records.labels == tuple(tuple(t) for _, t in rows)
        assert records.label_counts() == {"B-LOC": 1, "I-LOC": 1, "O": 4}
    assert len({records.fingerprint for records in found}) == 1
    assert (
        read_records(DataConfig(source=str(tmp_path / "a.csv"))).identities == found[0].identities
    )  # the same text is the same record


def test_tag_names_that_hugging_face_keeps_beside_numbers(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features({"text": List(Value("string")), "label": List(ClassLabel(names=["O", "B-LOC"]))})
    Dataset.from_dict({"text": [["to", "Rome"]], "label": [[0, 1]]}, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert read(tmp_path / "a.parquet").labels == (("O", "B-LOC"),)


@pytest.mark.parametrize(
    ("words", "tags", "reason"),
    [
        ([], [], "blank text"),
        (None, ["O"], "blank text"),
        (["a"], [], "missing label"),
        (["a", " "], ["O", "O"], "blank word"),
        (["a", None], ["O", "O"], "blank word"),
        (["a", "b"], ["O", None], "missing tag"),
        (["a", "\ud800"], ["O", "O"], "broken Unicode"),
    ],
)
def test_unusable_records_are_left_out_and_counted(tmp_path: Path, words: Any, tags: Any, reason: str) -> None:
    rows = [{"text": ["good"], "label": ["O"]}, {"text": words, "label": tags}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = read(tmp_path / "a.jsonl")
    assert (len(records), records.skipped) == (1, {reason: 1})


def test_a_word_without_a_tag_is_an_error_without_the_word(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nok,O\nSECRET name,O\n")
    with fails_with("data.tags_do_not_match", "2", "1", "2") as caught:
        read(tmp_path / "a.csv")
    assert "SECRET" not in str(caught.value)
    (tmp_path / "b.jsonl").write_text('{"text": [["nested"]], "label": ["O"]}')
    with fails_with("data.wrong_type", "text", "1"):
        read(tmp_path / "b.jsonl")
