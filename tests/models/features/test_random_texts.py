"""Texts of random tokens: the same everywhere, and with the frequencies that they are said to have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cotune.models.features.random_texts import draw_texts, rank_tokens
from tests.support.tiny_models import write_model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("bert", tmp_path_factory.mktemp("bert"))


def reader_of(*tokens: str) -> PreTrainedTokenizerFast:
    numbers = {token: number for number, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(numbers, unk_token="<unk>")), unk_token="<unk>")


def test_texts_are_random_tokens_in_the_frame_of_every_text(bert: Path) -> None:
    reader = AutoTokenizer.from_pretrained(bert)
    table = len(reader.get_vocab())
    batches = list(draw_texts(reader, table, 4000, 3))
    rows = [row for batch in batches for row in batch]
    empty = reader("")["input_ids"]
    special = set(reader.all_special_ids)
    assert len(rows) == 4000
    assert all(len({len(row) for row in batch}) == 1 for batch in batches)
    assert {len(row) - len(empty) for row in rows} == set(range(4, 32 - len(empty)))
    inner = [row[len(empty) // 2 : len(row) - len(empty) // 2] for row in rows]
    assert {token for row in inner for token in row} == set(reader.get_vocab().values()) - special
    assert list(draw_texts(reader, table, 4000, 3)) == batches
    assert list(draw_texts(reader, table, 4000, 4)) != batches


def test_frequent_tokens_come_first() -> None:
    """Neither single characters nor placeholders, which vocabularies list by code point and first."""
    reader = reader_of("<unk>", "[unused1]", "<0x0A>", "a", "b", "the", "##s", "of", "table", "beyond")
    assert reader.convert_ids_to_tokens(rank_tokens(reader, 9)) == ["the", "##s", "of", "table", "[unused1]", "<0x0A>", "a", "b"]


def test_tokens_are_drawn_by_zipfs_law() -> None:
    """Shares are within five standard deviations of 1 / (r + 2.7), scaled to a sum of 1."""
    reader = reader_of("<unk>", *(f"word{number}" for number in range(200)))
    drawn = [token for batch in draw_texts(reader, 201, 3000, 1) for row in batch for token in row]
    counts = Counter(drawn)
    total = sum(1 / (rank + 2.7) for rank in range(1, 201))
    for rank in range(1, 201):
        share = 1 / (rank + 2.7) / total
        assert abs(counts[rank] - share * len(drawn)) <= 5 * (len(drawn) * share * (1 - share)) ** 0.5


def test_characters_alone_are_a_vocabulary() -> None:
    """Some languages are written in them."""
    drawn = {token for batch in draw_texts(reader_of("<unk>", "a", "b"), 3, 50, 1) for row in batch for token in row}
    assert drawn == {1, 2}
