"""Sequence-to-sequence language modeling: an encoder reads a prompt, and a decoder writes what follows (T5, BART, Marian).

Prompt and target have `max_length` tokens each. A batch has one length for both sides: the bucket of the longer one, so that the
shape in which a record is computed is decided by the record alone. A decoder looks back only: what is padded behind a target
reaches nothing before it, so that it needs no mask, and the same kernels run whatever a batch holds.

Position t of an example has the number of the t-th target token as its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from cotune.data.config import DataConfig
from cotune.data.inputs.batching import LENGTHS, bucket_of_length
from cotune.data.tasks.causal import CausalLanguageModeling
from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.text import Collate, Example, collator, encode, map_or_none, synthetic_rows
from cotune.errors import ModelError

_ENCODED = 2000  # records that are tokenized at once only to count their tokens
_Pair = tuple[list[int], list[int]]  # tokens of a prompt and of its target


class SequenceToSequence(CausalLanguageModeling):
    """See `tasks.Task`."""

    described = "sequence-to-sequence model"
    pipeline = "text2text-generation"

    def columns(self, config: DataConfig) -> tuple[str, str]:
        return "prompt", "target"

    def model_class(self) -> Any:
        return AutoModelForSeq2SeqLM

    def fit(self, reader: Any, module: Any) -> None:
        super().fit(reader, module)
        if module.config.decoder_start_token_id is None:
            raise ModelError(
                "the base model's config.json does not say with which token a target begins (decoder_start_token_id): expected"
                " its number, as T5, BART and Marian have it",
                code="model.no_language_model",
            )

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        found = map_or_none(lambda passages: _pairs(reader, passages, max_length), inputs)
        return [self.blank(reader, max_length) if pair is None else _example(pair) for pair in found]

    def blank(self, reader: Any, length: int) -> Example:
        return {"input_ids": super().blank(reader, length)["input_ids"], "labels": [IGNORED]}

    def cut(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        parts = (inputs[start : start + _ENCODED] for start in range(0, len(inputs), _ENCODED))
        found = (pair for part in parts for pair in map_or_none(lambda some: _pairs(reader, some, max_length + 1), part))
        return sum(pair is not None and max(map(len, pair)) > max_length for pair in found)

    def lost(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        """Targets are cut by themselves: something is left of each."""
        return 0

    def prompts(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> list[list[int] | None]:
        found = map_or_none(lambda part: encode(reader, [passage.prompt for passage in part], max_length + 1), inputs)
        return [row if row and len(row) <= max_length else None for row in found]

    def prompt_positions(self, length: int) -> int:
        """The token with which the decoder begins."""
        return 1

    def samples(self, reader: Any) -> list[Example]:
        """A long prompt has a short target."""
        rows = synthetic_rows(reader)
        return [_example((row, other)) for row, other in zip(rows, reversed(rows), strict=True)]

    def bucket(self, example: Example, max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
        return bucket_of_length(max(len(example["input_ids"]), len(example["labels"])), max_length, lengths)

    def order(self, example: Example) -> tuple[Any, ...]:
        return -max(len(example["input_ids"]), len(example["labels"])), example["input_ids"], example["labels"]

    def collator(self, module: nn.Module, reader: Any, to: torch.device) -> Collate:
        start = int(module.config.decoder_start_token_id)  # type: ignore[union-attr, arg-type]
        pad = int(reader.pad_token_id)
        padded = collator(module, reader, to, self.blank)

        def collate(examples: Sequence[Example], length: int | None = None, slots: int | None = None) -> Batch:
            longest = max((max(len(example["input_ids"]), len(example["labels"])) for example in examples), default=1)
            batch = padded(examples, length or longest, slots)
            return {**batch, "decoder_input_ids": _shifted(batch["labels"], start, pad)}

        return collate


def _shifted(labels: Tensor, start: int, pad: int) -> Tensor:
    """What the decoder reads at each position: the target token before it."""
    before = torch.full_like(labels[:, :1], start)
    read = torch.cat([before, labels[:, :-1]], dim=1)
    return read.masked_fill(read == IGNORED, pad)


def _pairs(reader: Any, passages: Sequence[Any], most: int) -> list[_Pair]:
    """The tokens of prompts and of targets, of each at most `most`; both with the end token that the tokenizer gives texts."""
    prompts = encode(reader, [passage.prompt for passage in passages], most)
    targets = reader(text_target=[passage.target for passage in passages], truncation=True, max_length=most, padding=False)
    return [(prompt, list(target)) for prompt, target in zip(prompts, targets["input_ids"], strict=True)]


def _example(pair: _Pair) -> Example:
    return {"input_ids": pair[0], "labels": pair[1] or [IGNORED]}
