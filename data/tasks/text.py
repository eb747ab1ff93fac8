"""Sequence classification: a text has one class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cotune.data.class_names import class_name
from cotune.data.inputs.batching import LENGTHS, bucket_of_length
from cotune.data.inputs.declared_counts import check_tokenizer_counts
from cotune.data.inputs.token_limits import check_tokens, find_max_length
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.tasks.classes import IGNORED, Batch, ClassTargets
from cotune.data.types import Input, Label
from cotune.errors import ModelError

Example = dict[str, Any]  # {"input_ids": list[int], "labels": int}
_PLACEHOLDER_LABEL = "-"  # a label
_ENCODED = 2000  # texts that are tokenized at once only to count their tokens
_Given = TypeVar("_Given")
_Read = TypeVar("_Read")


class Collate(Protocol):
    """Examples -> a batch on the device, with "labels"."""

    def __call__(self, examples: Sequence[Example], length: int | None = None, slots: int | None = None) -> Batch:
        """Without length and slots, as long as the longest example, as wide as there are examples.

        With both, of exactly that shape: slots without an example hold blank rows, labeled IGNORED, and so does the slot of an
        example that cannot be read.
        """


class SequenceClassification(ClassTargets):
    """See `tasks.Task`."""

    described = "sequence classifier"
    needs = "its tokenizer"
    pipeline = "text-classification"
    problem_type: str | None = "single_label_classification"
    pools = True

    def model_class(self) -> Any:
        return AutoModelForSequenceClassification

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        text_column, label_column = file.wanted
        text = format_value(file, text_column, number, given)
        name = class_name(format_value(file, label_column, number, label))
        if not text.strip():
            return "blank text"
        if not name:
            return "missing label"
        return (text, name) if is_unicode(text) and is_unicode(name) else "broken Unicode"

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        return self.record(file, number, given, _PLACEHOLDER_LABEL)

    def reader(self, folder: Path) -> Any:
        """Return the tokenizer.

        Raises:
            ModelError: If it knows no word, as one that transformers makes where its files are missing, or says absurd numbers.
        """
        check_tokenizer_counts(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ModelError(
                "the base model's tokenizer knows no words: expected its files (tokenizer.json or a vocabulary) in the folder;"
                " download the folder again",
                code="model.unusable_tokenizer",
            )
        return tokenizer

    def fit(self, reader: Any, module: Any) -> None:
        """Fit tokenizer and model to each other: decoders often have no padding token, and their heads need the end of a text.

        Raises:
            ModelError: If the tokenizer has neither a padding nor an end token, or does not end texts as the model expects.
        """
        if reader.pad_token_id is None:
            if reader.eos_token is None:
                raise ModelError(
                    "the base model's tokenizer has neither a padding nor an end token: expected one of them",
                    code="model.unusable_tokenizer",
                )
            reader.pad_token = reader.eos_token
        module.config.pad_token_id = reader.pad_token_id
        check_tokens(reader, module)
        end = _end_token_of(module)
        if end is not None and reader("a")["input_ids"][-1:] != [end]:
            raise ModelError(
                f"the base model reads a text's class at the token number {end}, with which its tokenizer ends no text: expected"
                " one that does, as that of BART or T5; get the tokenizer that belongs to the model",
                code="model.unusable_tokenizer",
            )

    def longest(self, reader: Any, module: Any, wanted: int) -> int:
        return find_max_length(reader, module, wanted)

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        def read(texts: Sequence[Any]) -> list[list[int]]:
            return encode(reader, texts, max_length)

        rows = zip(map_or_none(read, inputs), targets, strict=True)
        return [{"input_ids": ids, "labels": target} if ids else self.blank(reader, max_length) for ids, target in rows]

    def blank(self, reader: Any, length: int) -> Example:
        """What stands in a slot without a record, or with one that cannot be read: a text without words, and no label."""
        return {"input_ids": _blank_tokens(reader, length), "labels": IGNORED}

    def cut(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        def read(texts: Sequence[Any]) -> list[list[int]]:
            return encode(reader, [self._text(text) for text in texts], max_length + 1)

        parts = (inputs[start : start + _ENCODED] for start in range(0, len(inputs), _ENCODED))
        return sum(len(ids or ()) > max_length for part in parts for ids in map_or_none(read, part))

    def _text(self, given: Any) -> str:
        """What the tokenizer reads of an input."""
        return str(given)

    def samples(self, reader: Any) -> list[Example]:
        return [{"input_ids": ids, "labels": k % 2} for k, ids in enumerate(synthetic_rows(reader))]

    def collator(self, module: nn.Module, reader: Any, to: torch.device) -> Collate:
        return collator(module, reader, to, self.blank, end=_end_token_of(module))

    def bucket(self, example: Example, max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
        return bucket_of_length(len(example["input_ids"]), max_length, lengths)

    def order(self, example: Example) -> tuple[Any, ...]:
        return -len(example["input_ids"]), example["input_ids"]

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        return [(best,) for best in scores.argmax(dim=1).tolist()]

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        unread = torch.full_like(scores[:1], torch.nan)
        return [unread if e["labels"] == IGNORED else scores[i : i + 1] for i, e in enumerate(examples)]

    def stand_in(self, features: Tensor, pad: int) -> dict[str, Tensor]:
        """One token that is not padding, or as many as there are vectors of each record."""
        positions = features.shape[1] if features.dim() == 3 else 1
        return {"input_ids": torch.full((len(features), positions), pad + 1, device=features.device)}


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token numbers of each text, cut off at max_length; an empty text is one padding token, so that it has a position."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)["input_ids"] if texts else []
    return [list(row) or [tokenizer.pad_token_id] for row in ids]


def synthetic_rows(tokenizer: Any) -> list[list[int]]:
    """Three rows of ordinary tokens: a short one, a long one, and a single token; with the special ones that every text has."""
    special = set(tokenizer.all_special_ids)
    usable = [i for i in range(min(len(tokenizer), 500)) if i not in special]
    before, after = frame_tokens(tokenizer, usable[0])
    rows = (usable[:3], usable[3:10] or usable[-7:], usable[10:11] or usable[-1:])  # a small vocabulary has no eleven
    return [[*before, *row, *after] for row in rows]


def frame_tokens(tokenizer: Any, token: int) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after the words of every text: those that a text of one word and an empty one share.

    Args:
        tokenizer: Of the base model.
        token: The number of an ordinary token.
    """
    empty, one = (list(tokenizer(text)["input_ids"]) for text in ("", tokenizer.convert_ids_to_tokens(token)))
    start = 0
    while start < len(empty) and empty[start] == one[start]:
        start += 1
    return empty[:start], empty[start:]


def map_or_none(read: Callable[[Sequence[_Given]], Sequence[_Read]], given: Sequence[_Given]) -> list[_Read | None]:
    """What `read` makes of each; None for one that it raises for, which tells nobody that it is there.

    All are read at once, for speed. Where that raises, each is read by itself.
    """
    if not given:
        return []
    try:
        return list(read(given))
    except BaseException as error:
        _reraise_interruption(error)
        return [_one_or_none(read, one) for one in given]


def _one_or_none(read: Callable[[Sequence[_Given]], Sequence[_Read]], one: _Given) -> _Read | None:
    try:
        return read([one])[0]
    except BaseException as error:
        _reraise_interruption(error)
        return None


def _reraise_interruption(error: BaseException) -> None:
    """Lets a user's interruption pass. A panic of the (Rust) tokenizer is no Exception, and yet a record's doing."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _blank_tokens(tokenizer: Any, length: int) -> list[int]:
    """The tokens of an empty text: the special ones with which every text begins and ends, or else one of padding."""
    return encode(tokenizer, [""], length)[0][:length]


def collator(
    module: nn.Module,
    tokenizer: Any,
    device: torch.device,
    blank: Callable[[Any, int], Example] | None = None,
    end: int | None = None,
) -> Collate:
    """Return a function that makes a batch on the device: input_ids and attention_mask (b, l), labels, and what the model needs.

    Labels are (b,), (b, k) where a record has k of them (a tuple), or (b, l) where every token has its own (a list).

    Position and token type numbers are passed explicitly, in the shape of the batch: looked up once for the whole batch, they
    would have no gradient per example (Opacus: `stack expects each tensor to be equal size`).

    Args:
        module: The model.
        tokenizer: Its tokenizer.
        device: Where batches go.
        blank: (tokenizer, length) -> the example of a blank row.
        end: The token with which every row of a batch without a fixed shape ends, and which stands nowhere else.
    """
    accepted = inspect.signature(module.forward).parameters
    config = cast(Any, module).config
    pad = tokenizer.pad_token_id
    table = getattr(config, "vocab_size", None)
    blank = blank or SequenceClassification().blank

    def collate(examples: Sequence[Example], length: int | None = None, slots: int | None = None) -> Batch:
        if end is not None and (length is None or slots is None):
            examples = [{**example, "input_ids": _with_end_token(example["input_ids"], end)} for example in examples]
        shown = [len(example["input_ids"]) for example in examples]
        if length is not None and slots is not None:
            empty = blank(tokenizer, length)
            readable = [_is_readable(example, length, table) for example in examples]
            examples = [example if can else empty for example, can in zip(examples, readable, strict=True)]
            shown = [count if can else 1 for count, can in zip(shown, readable, strict=True)]
            missing = slots - len(examples)
            examples = [*examples, *[empty] * missing]
            shown = [*shown, *[1] * missing]  # one position: a row that shows none would have no attention
        return _batch(examples, shown, length or max(shown))

    def _batch(examples: Sequence[Example], shown: Sequence[int], length: int) -> Batch:
        ids = torch.tensor([_padded(example["input_ids"], length, pad) for example in examples])
        mask = torch.tensor([_padded([1] * count, length, 0) for count in shown])
        batch = {"input_ids": ids, "attention_mask": mask}
        if config.model_type in ("bert", "distilbert", "gpt2") and "position_ids" in accepted:
            batch["position_ids"] = torch.arange(length).repeat(len(examples), 1)
        if config.model_type == "bert" and "token_type_ids" in accepted:
            batch["token_type_ids"] = torch.zeros_like(ids)
        labels = [example["labels"] for example in examples]
        batch["labels"] = torch.tensor([_padded(v, length, IGNORED) if isinstance(v, list) else v for v in labels])
        return {key: value.to(device) for key, value in batch.items()}

    return collate


def _end_token_of(module: Any) -> int | None:
    """The token whose vector an encoder with a decoder is classified by (BART, T5): a text that spells it would have two."""
    return cast("int | None", module.config.eos_token_id) if getattr(module.config, "is_encoder_decoder", False) else None


def _with_end_token(row: list[int], end: int) -> list[int]:
    """The row with the token at its end alone, and no longer than it was."""
    words = [token for token in row if token != end]
    return [*words[: max(0, len(row) - 1)], end]


def _is_readable(example: Example, length: int, table: int | None) -> bool:
    """Whether an example fits into a row of a batch, each of its tokens into the model's table."""
    ids = example["input_ids"]
    return len(ids) <= length and (table is None or not ids or (min(ids) >= 0 and max(ids) < table))


def _padded(row: list[int], length: int, value: int) -> list[int]:
    return row + [value] * (length - len(row))
