"""Sequence classification: a text has one class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cotune.models.errors import ModelError
from cotune.models.formats import DataFile, is_unicode, word_of
from cotune.models.inputs import Input, Label
from cotune.models.reach import check_tokens, longest_row

__all__ = ["IGNORED", "Batch", "Example", "SequenceClassification", "collator", "encode", "made_up_rows"]

Example = dict[str, Any]  # {"input_ids": list[int], "labels": int}
Batch = dict[str, Tensor]
IGNORED = -100  # the label of a position that has none


class SequenceClassification:
    """See `tasks.Task`."""

    key = "text"
    described = "sequence classifier"
    needs = "its tokenizer"
    pools = True

    def model_class(self) -> Any:
        return AutoModelForSequenceClassification

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        text_column, label_column = file.wanted
        text = word_of(file, text_column, number, given)
        name = word_of(file, label_column, number, label).strip()
        if not text.strip():
            return "blank text"
        if not name:
            return "missing label"
        return (text, name) if is_unicode(text) and is_unicode(name) else "broken Unicode"

    def reader(self, folder: Path) -> Any:
        """The tokenizer. Without its files, transformers makes one that knows no word."""
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ModelError(
                "the base model's tokenizer knows no words: expected its files (tokenizer.json or a vocabulary) in the folder;"
                " download the folder again"
            )
        return tokenizer

    def fit(self, reader: Any, module: Any) -> None:
        """Decoders often have no padding token; their classification heads need to know where a text ends."""
        if reader.pad_token_id is None:
            if reader.eos_token is None:
                raise ModelError("the base model's tokenizer has neither a padding nor an end token: expected one of them")
            reader.pad_token = reader.eos_token
        module.config.pad_token_id = reader.pad_token_id
        check_tokens(reader, module)

    def longest(self, reader: Any, module: Any, wanted: int) -> int:
        return longest_row(reader, module, wanted)

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        ids = encode(reader, inputs, max_length)
        return [{"input_ids": row, "labels": target} for row, target in zip(ids, targets, strict=True)]

    def samples(self, reader: Any) -> list[Example]:
        return [{"input_ids": ids, "labels": k % 2} for k, ids in enumerate(made_up_rows(reader))]

    def collator(self, module: nn.Module, reader: Any, to: torch.device) -> Callable[[Sequence[Example]], Batch]:
        return collator(module, reader, to)

    def order(self, example: Example) -> tuple[Any, ...]:
        return -len(example["input_ids"]), example["input_ids"]

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        return [(best,) for best in scores.argmax(dim=1).tolist()]

    def stand_in(self, features: Tensor, pad: int) -> dict[str, Tensor]:
        """One token that is not padding."""
        return {"input_ids": torch.full((len(features), 1), pad + 1, device=features.device)}


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token numbers of each text, cut off at max_length; an empty text is one padding token, so that it has a position."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)["input_ids"] if texts else []
    return [list(row) or [tokenizer.pad_token_id] for row in ids]


def made_up_rows(tokenizer: Any) -> list[list[int]]:
    """Three rows of ordinary tokens: a short one, a long one, and a single token."""
    special = set(tokenizer.all_special_ids)
    usable = [i for i in range(min(len(tokenizer), 500)) if i not in special]
    return [usable[:3], usable[3:10], usable[10:11]]


def collator(module: nn.Module, tokenizer: Any, device: torch.device) -> Callable[[Sequence[Example]], Batch]:
    """Examples -> a batch on the device: input_ids and attention_mask (b, l), labels, and what the model wants beside.

    Labels are (b,), or (b, l) where every token has its own. Position and token type numbers are passed explicitly, in the
    batch's shape: looked up once for the whole batch, they would have no gradient per example (Opacus: `stack expects each tensor
    to be equal size`).
    """
    accepted = inspect.signature(module.forward).parameters
    kind = cast(Any, module).config.model_type
    pad = tokenizer.pad_token_id

    def collate(examples: Sequence[Example]) -> Batch:
        rows = [example["input_ids"] for example in examples]
        length = max(len(row) for row in rows)
        ids = torch.tensor([_padded(row, length, pad) for row in rows])
        mask = torch.tensor([_padded([1] * len(row), length, 0) for row in rows])
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind in ("bert", "distilbert", "gpt2") and "position_ids" in accepted:
            batch["position_ids"] = torch.arange(length).repeat(len(rows), 1)
        if kind == "bert" and "token_type_ids" in accepted:
            batch["token_type_ids"] = torch.zeros_like(ids)
        labels = [example["labels"] for example in examples]
        batch["labels"] = torch.tensor([v if isinstance(v, int) else _padded(v, length, IGNORED) for v in labels])
        return {key: value.to(device) for key, value in batch.items()}

    return collate


def _padded(row: list[int], length: int, value: int) -> list[int]:
    return row + [value] * (length - len(row))
