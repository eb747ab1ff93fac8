"""Token classification: every word of a text has a tag.

A word's tag belongs to its first token; its other tokens and special tokens have none. The words are tokenized as the running
text that they make with single spaces, which is how `transformers.pipeline` will meet them; a word's first token is the first one
that covers a letter of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification

from cotune.data.class_names import class_name
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.text import Example, SequenceClassification, map_or_none, synthetic_rows
from cotune.data.types import Input, Label
from cotune.errors import DataError, ModelError

NOT_PREDICTED = -1  # the answer for a word that the model did not read: right for no tag


class TokenClassification(SequenceClassification):
    """See `tasks.Task`. An example has "starts" beside tokens and labels: the position of each word's first token, or None."""

    described = "token classifier"
    needs = "its (fast) tokenizer"
    pipeline = "token-classification"
    problem_type: str | None = None
    pools = False

    def model_class(self) -> Any:
        return AutoModelForTokenClassification

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        text_column, label_column = file.wanted
        words = read_words(file, text_column, number, given)
        tags = tuple(class_name(tag) for tag in read_words(file, label_column, number, label))
        if not words:
            return "blank text"
        if not tags:
            return "missing label"
        check_tag_count(file, number, words, tags)
        if not all(word.strip() for word in words):
            return "blank word"
        if not all(tags):
            return "missing tag"
        return (words, tags) if all(map(is_unicode, (*words, *tags))) else "broken Unicode"

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        return self.record(file, number, given, ["O"] * len(read_words(file, file.wanted[0], number, given)))

    def missing_target(self, given: Any) -> tuple[int, ...]:
        return (0,) * len(given)

    def reader(self, folder: Path) -> Any:
        tokenizer = super().reader(folder)
        if not tokenizer.is_fast:
            raise ModelError(
                "the base model's tokenizer cannot say which token came from which word: expected a fast one (tokenizer.json);"
                " save it as one, or use another base model",
                code="model.unusable_tokenizer",
            )
        return tokenizer

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        def read(sentences: Sequence[Any]) -> list[tuple[list[int], list[tuple[int, int]]]]:
            texts = [" ".join(words) for words in sentences]
            found = reader(texts, truncation=True, max_length=max_length, padding=False, return_offsets_mapping=True)
            return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

        rows = zip(map_or_none(read, inputs), inputs, targets, strict=True)
        return [self._example(reader, max_length, tokens, words, tags) for tokens, words, tags in rows]

    def _text(self, given: Any) -> str:
        return " ".join(given)

    def _example(self, reader: Any, max_length: int, tokens: Any, words: Sequence[str], tags: Sequence[int]) -> Example:
        """One with another number of tags than words is a blank row, too: which tag is whose is not known."""
        if tokens is None or len(words) != len(tags):
            return {**self.blank(reader, max_length), "starts": [None] * len(tags)}
        ids, offsets = tokens
        return _example(list(ids) or [reader.pad_token_id], _starts(words, offsets), tags)

    def blank(self, reader: Any, length: int) -> Example:
        ids = super().blank(reader, length)["input_ids"]
        return {"input_ids": ids, "labels": [IGNORED] * len(ids), "starts": []}

    def samples(self, reader: Any) -> list[Example]:
        """Every other token is a word of its own."""
        rows = [(ids, list(range(0, len(ids), 2))) for ids in synthetic_rows(reader)]
        return [_example(ids, starts, [i % 2 for i in starts]) for ids, starts in rows]

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        best = scores.argmax(dim=2).tolist()
        return [
            tuple(NOT_PREDICTED if start is None else row[start] for start in example["starts"])
            for row, example in zip(best, examples, strict=True)
        ]

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        unread = torch.full_like(scores[0, 0], torch.nan)
        return [
            torch.stack([unread if start is None else row[start] for start in example["starts"]])
            for row, example in zip(scores, examples, strict=True)
        ]


def check_tag_count(file: DataFile, number: int, words: Sequence[str], tags: Sequence[str]) -> None:
    """Raise DataError unless there is a tag for each word of a record."""
    if len(words) != len(tags):
        raise DataError(
            f"{file.name} has {len(words)} words and {len(tags)} tags in record {number}: expected a tag for each word; in"
            " CSV and TSV both are separated by spaces",
            code="data.tags_do_not_match",
        )


def read_words(file: DataFile, column: str, number: int, value: object) -> tuple[str, ...]:
    """Return the words of a list, or of a text with spaces between them."""
    if isinstance(value, list | tuple):
        return tuple(format_value(file, column, number, word) for word in value)
    return tuple(format_value(file, column, number, value).split())


def _example(ids: list[int], starts: Sequence[int | None], tags: Sequence[int]) -> Example:
    labels = [IGNORED] * len(ids)
    for start, tag in zip(starts, tags, strict=True):
        if start is not None:
            labels[start] = tag
    return {"input_ids": ids, "labels": labels, "starts": list(starts)}


def _starts(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return the position of the first token of each word; None for a word that has none of its own or was cut off.

    Args:
        words: Of the text.
        offsets: (start, end) of each token in the text; (0, 0) for special tokens.
    """
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    found: list[int | None] = []
    position = 0
    for word, end in zip(words, ends, strict=True):
        begin = end - len(word) - 1
        while position < len(offsets) and offsets[position][1] <= begin:
            position += 1
        reached = position < len(offsets) and offsets[position][0] < end - 1
        found.append(position if reached else None)
        position += reached
    return found
