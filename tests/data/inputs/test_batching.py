from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.inputs.batching import LENGTHS, bucket_of_length, fixed_batches
from cotune.data.readers.images import Image
from cotune.data.tasks.classes import IGNORED, example_losses, logits
from cotune.data.tasks.task import get_task
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.trainable import TrainableModel

Make = Callable[..., TrainableModel]


@given(st.integers(1, 40_000), st.integers(2, 32_768))
def test_bucket_is_the_next_length_up_to_the_model_limit(tokens: int, longest: int) -> None:
    tokens = min(tokens, longest)
    bucket = bucket_of_length(tokens, longest)
    assert tokens <= bucket <= longest
    assert bucket == longest or bucket in LENGTHS
    assert all(not tokens <= length < bucket for length in LENGTHS)


def test_a_batch_is_never_too_short_for_a_hidden_position() -> None:
    assert bucket_of_length(1, 1) == 2


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(2, 9))
def test_each_row_is_in_one_batch_beside_a_blank_row(sizes: list[int], slots: int) -> None:
    batches = list(fixed_batches(range(len(sizes)), lambda row: bucket_of_length(sizes[row], 256), slots))
    assert sorted(row for rows, _ in batches for row in rows) == list(range(len(sizes)))
    for rows, bucket in batches:
        assert 1 <= len(rows) < slots
        assert all(bucket_of_length(sizes[row], 256) == bucket for row in rows)
    assert [bucket for _, bucket in batches] == sorted(bucket for _, bucket in batches)


def test_a_batch_without_a_blank_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="slots=1"):
        list(fixed_batches([0], lambda row: 8, 1))


# --- collators


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "qwen2"])
def test_blank_rows_lose_nothing_and_change_nothing(shared: Make, texts: tuple[str, ...], kind: str) -> None:
    model = shared(kind)
    parameters = model.train_only(model.names("head"))
    task = model.loaded.task
    reader = model.loaded.reader
    collate = task.collator(model.module, reader, model.device)
    examples = task.examples(reader, 32, texts, [0, 1, 2, 0, 1])
    batch = collate(examples, 32, 8)
    assert {tuple(value.shape)[:1] for value in batch.values()} == {(8,)}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 32)
    assert not bool(batch["attention_mask"].all())
    losses = example_losses(model.module, batch)
    assert losses[5:].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(losses[:5], example_losses(model.module, collate(examples)), atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(losses[5:].sum(), parameters)
    assert not any(bool(g.any()) for g in gradients)


def test_blank_rows_of_tags_lose_nothing(base_model: Callable[[str], Path], texts: tuple[str, ...]) -> None:
    model = tagger(base_model)
    task = model.loaded.task
    reader = model.loaded.reader
    words = [tuple(text.split()) for text in texts]
    examples = task.examples(reader, 32, words, [tuple(i % 2 for i in range(len(w))) for w in words])
    batch = task.collator(model.module, reader, model.device)(examples, 16, 9)
    assert batch["labels"].shape == (9, 16)
    assert example_losses(model.module, batch)[5:].tolist() == [0.0] * 4


def test_a_batch_of_blank_rows_alone_is_finite(shared: Make) -> None:
    model = shared("gpt2")
    collate = model.loaded.task.collator(model.module, model.loaded.reader, model.device)
    assert bool(logits(model.module, collate([], 8, 4)).isfinite().all())


def tagger(base_model: Callable[[str], Path]) -> TrainableModel:
    config = ModelConfig(base=str(base_model("bert")), max_length=32)
    loaded = load_model(config, ("O", "B"), 1, "token-classification")
    return TrainableModel(loaded, None, 1, torch.device("cpu"))


# --- records that cannot be encoded


class Moody:
    """A tokenizer that raises for a text that it does not like, as some do for a token beyond their tables."""

    def __init__(self, reader: Any, hated: str) -> None:
        self.reader = reader
        self.hated = hated

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        if any(self.hated in text for text in texts):
            raise OverflowError("no")
        return self.reader(texts, **options)


def test_unencodable_text_is_a_blank_row_and_others_stay(shared: Make, texts: tuple[str, ...]) -> None:
    model = shared("bert")
    task = model.loaded.task
    reader = model.loaded.reader
    expected = task.examples(reader, 32, texts, [0, 1, 2, 0, 1])
    got = task.examples(Moody(reader, "awful"), 32, texts, [0, 1, 2, 0, 1])
    assert got[2] == task.blank(reader, 32)
    assert got[2]["labels"] == IGNORED
    assert [*got[:2], *got[3:]] == [*expected[:2], *expected[3:]]


def test_unencodable_or_untagged_words_are_a_blank_row(base_model: Callable[[str], Path], texts: tuple[str, ...]) -> None:
    model = tagger(base_model)
    task = model.loaded.task
    reader = model.loaded.reader
    words = [tuple(text.split()) for text in texts]
    tags = [(0,) * len(w) for w in words]
    for got in (
        task.examples(Moody(reader, "awful"), 32, words, tags)[2],
        task.examples(reader, 32, words, [*tags[:2], (0,), *tags[3:]])[2],
    ):
        assert set(got["labels"]) == {IGNORED}
        assert not any(got["starts"])
        batch = task.collator(model.module, reader, model.device)([got], 16, 2)
        assert example_losses(model.module, batch).tolist() == [0.0, 0.0]


def test_a_token_beyond_the_table_is_a_blank_row(shared: Make) -> None:
    model = shared("bert")
    collate = model.loaded.task.collator(model.module, model.loaded.reader, model.device)
    fine = {"input_ids": [5, 6], "labels": 1}
    beyond = {"input_ids": [5, 99_999], "labels": 1}
    batch = collate([beyond, fine], 8, 4)
    assert batch["labels"].tolist() == [IGNORED, 1, IGNORED, IGNORED]
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][3])


def test_an_image_that_cannot_be_decoded_is_a_blank_row(base_model: Callable[[str], Path]) -> None:
    loaded = load_model(ModelConfig(base=str(base_model("vit"))), ("a", "b"), 1, "image-classification")
    task = get_task("image-classification")
    fine = task.samples(loaded.reader)[1]
    gone = {"image": Image(b"", Path("/nowhere.png")), "labels": 1}
    batch = task.collator(loaded.module, loaded.reader, torch.device("cpu"))([gone, fine], 1, 4)
    assert batch["labels"].tolist() == [IGNORED, 1, IGNORED, IGNORED]
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert torch.equal(batch["pixel_values"][1], fine["image"])
    assert not bool(batch["pixel_values"][0].any())
