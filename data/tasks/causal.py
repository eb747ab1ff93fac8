"""Causal language modeling: a model goes on with a text; the targets are the tokens of what it is to write.

A record is a prompt and what is to follow, a text alone, all of which is to follow, or a chat, of which the last answer is to
follow the messages before it. With a system message or an instruction, a prompt and what is to follow are a chat. The loss of a
record is the mean over its own target tokens, so that a long record moves the model no more than a short one. Records are never
packed into one row, where one would be read by another.

Position t of an example has the number of token t + 1 as its label, if that is a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cotune.data.config import DataConfig
from cotune.data.inputs.chat_template import end_tokens, write_chats
from cotune.data.inputs.chat_wording import wording_of
from cotune.data.inputs.chats import read_asked, read_chat
from cotune.data.metrics.metrics import TextAnswer, TextMetrics, compute_text_metrics
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.tasks.classes import IGNORED, Batch, mean_over_labels
from cotune.data.tasks.text import Example, SequenceClassification, map_or_none
from cotune.data.tasks.token_losses import token_losses
from cotune.data.types import Chat, Input, Label, Passage
from cotune.errors import ModelError

NO_CLASS = ""  # the label of a record that has none
_ENCODED = 2000  # records that are tokenized at once only to count their tokens


class CausalLanguageModeling(SequenceClassification):
    """See `tasks.Task`.

    Args:
        max_target: Maximum number of tokens of a target; the rest is truncated. None: up to the length of the row. Scores are
            computed at that many positions of every row, whatever it holds.
    """

    described = "language model"
    pipeline = "text-generation"
    problem_type: str | None = None
    pools = False
    keeps_head = True
    floor = "the unchanged base model"

    def __init__(self, max_target: int | None = None) -> None:
        self.max_target = max_target

    def suited(
        self, target_range: tuple[float, float] | None, labels: Sequence[str], max_target: int | None = None
    ) -> CausalLanguageModeling:
        return self if max_target is None else CausalLanguageModeling(max_target)

    def columns(self, config: DataConfig) -> tuple[str, str]:
        if config.messages is not None:
            return "messages", "messages"
        return ("text", "text") if config.prompt is None else ("prompt", "target")

    def model_class(self) -> Any:
        return AutoModelForCausalLM

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        if file.config.messages is not None:
            chat = read_chat(given)
            return chat if isinstance(chat, str) else (wording_of(file.config).begin(chat), NO_CLASS)
        input_column, target_column = file.wanted
        prompt = "" if file.target == "text" else format_value(file, input_column, number, given)
        target = format_value(file, target_column, number, label)
        if not target.strip():
            return "blank text" if file.target == "text" else "blank target"
        if file.target != "text" and not prompt.strip():
            return "blank prompt"
        if not is_unicode(prompt) or not is_unicode(target):
            return "broken Unicode"
        return _pair(file, prompt, target), NO_CLASS

    def targets(self, held: Sequence[Label], classes: Sequence[str]) -> list[Any]:
        """The target is a part of the input."""
        return [0] * len(held)

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        """A prompt without a target, and without the separator; or the messages that are to be answered."""
        if file.config.messages is not None:
            chat = read_asked(given)
            return chat if isinstance(chat, str) else (chat, NO_CLASS)
        prompt = format_value(file, file.wanted[0], number, given)
        if not prompt.strip():
            return "blank prompt"
        return (Passage(prompt, ""), NO_CLASS) if is_unicode(prompt) else "broken Unicode"

    def fit(self, reader: Any, module: Any) -> None:
        super().fit(reader, module)
        output = module.get_output_embeddings()
        if output is None or output.weight.shape[0] < module.get_input_embeddings().weight.shape[0]:
            raise ModelError(
                f"the architecture {module.config.model_type} has no score for every token: expected a causal language"
                " model; use another base model",
                code="model.no_language_model",
            )

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        def read(passages: Sequence[Any]) -> list[Example | None]:
            return [self._example(*parts, max_length) for parts in _tokens(reader, passages, max_length)]

        return [found or self.blank(reader, max_length) for found in map_or_none(read, inputs)]

    def blank(self, reader: Any, length: int) -> Example:
        ids = super().blank(reader, length)["input_ids"]
        return {"input_ids": ids, "labels": [IGNORED] * len(ids)}

    def cut(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        most = max_length + 1 if self.max_target is None else self.max_target
        read = _all_tokens(reader, inputs, max_length)
        return sum(len(target) > most or len(prompt) + len(target) > max_length + 1 for prompt, target in read)

    def lost(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        found = (self._example(*parts, max_length) for parts in _all_tokens(reader, inputs, max_length))
        return sum(example is None or not _has_target(example) for example in found)

    def refused(self, reader: Any, inputs: Sequence[Any]) -> int:
        return sum(written is None for written in write_chats(reader, inputs)) if _are_chats(inputs) else 0

    def prompts(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> list[list[int] | None]:
        """The tokens after which a model writes, for each input; None for one that is too long or cannot be read."""
        found = map_or_none(lambda part: [prompt for prompt, _ in _tokens(reader, part, max_length)], inputs)
        return [row if row and len(row) <= max_length else None for row in found]

    def prompt_positions(self, length: int) -> int:
        """Return the number of positions that a prompt of `length` tokens takes in the generated sequence."""
        return length

    def ends(self, reader: Any, inputs: Sequence[Any]) -> list[int]:
        """The tokens with which a model ends what it writes for such inputs."""
        if _are_chats(inputs):
            return end_tokens(reader)
        return [] if reader.eos_token_id is None else [reader.eos_token_id]

    def samples(self, reader: Any) -> list[Example]:
        """Of the longest the first half is a prompt."""
        rows = [example["input_ids"] for example in super().samples(reader)]
        rows = [ids if len(ids) > 1 else ids * 2 for ids in rows]
        halves = [len(ids) // 2 if len(ids) == max(map(len, rows)) else 1 for ids in rows]
        found = (self._example(ids[:half], ids[half:], len(ids)) for ids, half in zip(rows, halves, strict=True))
        return [example for example in found if example is not None]

    def _example(self, prompt: list[int], target: list[int], max_length: int) -> Example | None:
        return _example(prompt, target[: self.max_target], max_length)

    def losses(self, module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
        losses, _ = token_losses(module, batch, self.max_target)
        return mean_over_labels(losses, batch["labels"])

    def scores(self, module: nn.Module, batch: Batch) -> Tensor:
        """(b, l, 2): the loss of each target token, and by how much its score is below the highest; 0 without a target."""
        return torch.stack(token_losses(module, batch, self.max_target), dim=-1)

    def are_right(self, scores: Tensor, labels: Tensor) -> Tensor:
        return ((scores[..., 1] == 0) | (labels == IGNORED)).all(dim=1)

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        """One answer for each example: the sum of its losses, its target tokens, and how many of these are the most probable."""
        return [(_answer(row, example["labels"]),) for row, example in zip(scores.double().cpu(), examples, strict=True)]

    def metrics(self, truth: Sequence[Any], predicted: Sequence[Any], classes: int) -> TextMetrics:
        return compute_text_metrics(predicted)

    def read_metrics(self, values: Mapping[str, float]) -> TextMetrics:
        return TextMetrics(**values)

    def constant(self, held: Sequence[Label], classes: Sequence[str]) -> None:
        """No text is right most often: the unchanged base model is what training is compared with."""


def _pair(file: DataFile, prompt: str, target: str) -> Passage | Chat:
    """A prompt with its target, joined as the configuration says."""
    if file.config.chats:
        return wording_of(file.config).ask(prompt, target)
    return Passage(prompt if file.target == "text" else prompt + file.config.separator, target, (prompt, target))


def _answer(scores: Tensor, labels: Sequence[int]) -> TextAnswer:
    """What (l, 2) scores say of the target tokens of an example, which may be shorter than l."""
    own = scores[[position for position, label in enumerate(labels) if label != IGNORED]]
    return float(own[:, 0].sum()), len(own), int((own[:, 1] == 0).sum())


def _has_target(example: Example) -> bool:
    return any(label != IGNORED for label in example["labels"])


def _tokens(reader: Any, passages: Sequence[Any], most: int) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of prompts and of targets, of each a few more than `most` at most; an end token stands behind every target.

    Raises:
        ValueError: For a chat that the template cannot write.
    """
    if _are_chats(passages):
        yield from _chat_tokens(reader, passages, most)
        return
    end = [] if reader.eos_token_id is None else [reader.eos_token_id]
    cut = {"truncation": True, "max_length": most + 2, "padding": False}
    prompts = prompt_tokens(reader, [passage.prompt for passage in passages], most)
    targets = reader([passage.target for passage in passages], add_special_tokens=False, **cut)["input_ids"]
    for prompt, target in zip(prompts, targets, strict=True):
        yield prompt, [*target, *end]


def _chat_tokens(reader: Any, chats: Sequence[Chat], most: int) -> Iterator[tuple[list[int], list[int]]]:
    """The template has written special tokens out: the tokenizer adds none."""
    written = [each for each in write_chats(reader, chats) if each is not None]
    if len(written) < len(chats):
        raise ValueError("a chat cannot be written")
    cut = {"truncation": True, "max_length": most + 2, "padding": False, "add_special_tokens": False}
    prompts = reader([each.prompt for each in written], **cut)["input_ids"]
    targets = reader([each.target for each in written], **cut)["input_ids"]
    for prompt, target in zip(prompts, targets, strict=True):
        yield list(prompt), list(target)


def _are_chats(inputs: Sequence[Any]) -> bool:
    """Whether the inputs of a data set are chats: all are, or none."""
    return bool(inputs) and isinstance(inputs[0], Chat)


def prompt_tokens(reader: Any, prompts: Sequence[str], most: int) -> Iterator[list[int]]:
    """Yield the tokens of prompts, of each a few more than `most` at most; no end token stands behind one."""
    if not prompts:
        return
    for row in reader(list(prompts), truncation=True, max_length=most + 2, padding=False)["input_ids"]:
        ended = reader.eos_token_id is not None and row[-1:] == [reader.eos_token_id]
        yield list(row[:-1] if ended else row)


def _example(prompt: list[int], target: list[int], max_length: int) -> Example | None:
    """The last token is read by nobody, as nothing follows it; None where nothing is left to be read or predicted."""
    whole = [*prompt, *target][: max_length + 1]
    labels = [IGNORED if position < len(prompt) else token for position, token in enumerate(whole)]
    if len(whole) < 2:
        return None
    return {"input_ids": whole[:-1], "labels": labels[1:]}


def _all_tokens(reader: Any, inputs: Sequence[Any], most: int) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of all records that can be read."""
    if _are_chats(inputs):
        inputs = [chat for chat, written in zip(inputs, write_chats(reader, inputs), strict=True) if written is not None]
    for start in range(0, len(inputs), _ENCODED):
        for found in map_or_none(lambda part: list(_tokens(reader, part, most)), inputs[start : start + _ENCODED]):
            if found is not None:
                yield found
