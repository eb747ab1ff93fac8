"""Extractive question answering: the answer to a question is a part of a text, whose first and last token a model points at.

A record is read as one row, the question before its context. A context that does not fit is taken in parts, which overlap by a
third. A model trains on the one part of a record that has the answer farthest from its ends: a function of the record alone. What
it answers is looked for in all parts. A record with an answer that no part holds contributes nothing, and is counted.

The label of a token is 1 where the answer begins, 2 where it ends, 3 where it does both, 0 elsewhere in the context, and IGNORED
outside of it: no answer is in a question, nor in what a row is padded with, so that scores there take no part in a loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering

from cotune.data.config import DataConfig
from cotune.data.metrics.answer_metrics import AnswerMetrics, compute_answer_metrics, judge_answer
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.text import Collate, Example, SequenceClassification, map_or_none, synthetic_rows
from cotune.data.types import Input, Label, Question
from cotune.errors import ModelError

_BEGINS = 1
_ENDS = 2
_OVERLAP = 3  # consecutive parts of a long context overlap by 1/3 of their tokens
_LONGEST_ANSWER = 30  # tokens, as in the scripts of transformers
_LEAST_SHARE = 8  # the context has at least 1/8 of a row's tokens, where it is split into parts
_ENCODED = 200  # records that are tokenized at once, where not all of their parts are kept
_NO_CLASS = ""


class QuestionAnswering(SequenceClassification):
    """See `tasks.Task`."""

    key = "context"
    described = "model that answers questions"
    pipeline = "question-answering"
    problem_type: str | None = None
    pools = False
    floor = "the base model with a new head"

    def columns(self, config: DataConfig) -> tuple[str, str]:
        return "context", "answers"

    def model_class(self) -> Any:
        return AutoModelForQuestionAnswering

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        asked, answers = label if isinstance(label, tuple) else (None, label)
        context = format_value(file, file.config.context, number, given)
        question = format_value(file, file.config.question, number, asked)
        if not context.strip():
            return "blank context"
        if not question.strip():
            return "blank question"
        found = _read_answers(context, answers)
        if isinstance(found, str):
            return found
        texts, start = found
        if not all(map(is_unicode, (context, question, *texts))):
            return "broken Unicode"
        return Question(question.strip(), context, texts, start), _NO_CLASS

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        """A pair of a question and its context."""
        question, context = (format_value(file, file.config.context, number, value) for value in _pair(given))
        if not context.strip():
            return "blank context"
        if not question.strip():
            return "blank question"
        readable = is_unicode(question) and is_unicode(context)
        return (Question(question.strip(), context, (), 0), _NO_CLASS) if readable else "broken Unicode"

    def targets(self, held: Sequence[Label], classes: Sequence[str]) -> list[Any]:
        """The answer is a part of the input."""
        return [0] * len(held)

    def reader(self, folder: Path) -> Any:
        tokenizer = super().reader(folder)
        if not tokenizer.is_fast:
            raise ModelError(
                "the base model's tokenizer cannot say where in a text a token stands: expected a fast one (tokenizer.json); save"
                " it as one, or use another base model",
                code="model.unusable_tokenizer",
            )
        return tokenizer

    def fit(self, reader: Any, module: Any) -> None:
        if module.config.is_encoder_decoder:
            raise ModelError(
                f"the architecture {module.config.model_type} has an encoder and a decoder, which read a question twice:"
                " expected an encoder such as BERT, DistilBERT or RoBERTa; use another base model",
                code="model.no_question_answering",
            )
        super().fit(reader, module)

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        found = self._in_parts(reader, max_length, inputs)
        return [self.blank(reader, max_length) if each is None else max(each, key=_room_around_answer) for each in found]

    def windows(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> list[list[Example]]:
        """Return the rows of each record, of the question and a part of its context; a blank one where it cannot be read."""
        found = map_or_none(lambda part: _encode(reader, part, max_length), inputs)
        return [windows or [self.blank(reader, max_length)] for windows in found]

    def blank(self, reader: Any, length: int) -> Example:
        ids = super().blank(reader, length)["input_ids"]
        return {"input_ids": ids, "labels": [IGNORED] * len(ids)}

    def cut(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        return sum(windows is None or len(windows) > 1 for windows in self._in_parts(reader, max_length, inputs))

    def lost(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        found = self._in_parts(reader, max_length, inputs)
        return sum(windows is None or all(max(each["labels"]) < _BEGINS for each in windows) for windows in found)

    def _in_parts(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> Iterator[list[Example] | None]:
        for start in range(0, len(inputs), _ENCODED):
            yield from map_or_none(lambda part: _encode(reader, part, max_length), inputs[start : start + _ENCODED])

    def samples(self, reader: Any) -> list[Example]:
        """Of each all but the first token is context, and the answer the last two; with one token there is no choice."""
        rows = [ids if len(ids) > 2 else ids * 4 for ids in synthetic_rows(reader)]
        return [{"input_ids": ids, "labels": [IGNORED, *[0] * (len(ids) - 3), _BEGINS, _ENDS]} for ids in rows]

    def collator(self, module: nn.Module, reader: Any, to: torch.device) -> Collate:
        """With the types of tokens, where model and tokenizer know them: 0 of a question, 1 of its context, as in BERT."""
        plain = super().collator(module, reader, to)

        def collate(examples: Sequence[Example], length: int | None = None, slots: int | None = None) -> Batch:
            batch = plain(examples, length, slots)
            if "token_type_ids" in batch:
                for row, example in enumerate(examples):
                    types = torch.tensor(example.get("types", []), device=to)[: batch["input_ids"].shape[1]]
                    batch["token_type_ids"][row, : len(types)] = types
            return batch

        return collate

    def order(self, example: Example) -> tuple[Any, ...]:
        return -len(example["input_ids"]), example["input_ids"], example["labels"]

    def losses(self, module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
        return self.losses_from_scores(self.scores(module, batch), batch["labels"])

    def losses_from_scores(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean of two cross-entropies, of the first and of the last token, each over the tokens of the context."""
        marks = _marks(labels)
        found = functional.log_softmax(_inside(scores, labels), dim=1)
        each = -(found * marks).sum(dim=1) / marks.sum(dim=1).clamp(min=1)
        return each.mean(dim=1)

    def scores(self, module: nn.Module, batch: Batch) -> Tensor:
        """(b, l, 2): how much speaks for each token as the first, and as the last."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        output = module(**inputs)
        return torch.stack([output.start_logits, output.end_logits], dim=-1).float()

    def are_right(self, scores: Tensor, labels: Tensor) -> Tensor:
        marks = _marks(labels)
        best = _inside(scores, labels).argmax(dim=1, keepdim=True)
        return ((marks.gather(1, best) > 0) | (marks.sum(dim=1, keepdim=True) == 0)).all(dim=2)[:, 0]

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        """One answer for each example: token F1, and whether it is exact; 0 for one that cannot be read."""
        given = self.texts(scores, examples)
        return [(judge_answer(text, example.get("answers", ())),) for text, example in zip(given, examples, strict=True)]

    def texts(self, scores: Tensor, examples: Sequence[Example]) -> list[str]:
        """The most probable part of each context; "" where there is none."""
        return [_best(row, example)[1] for row, example in zip(scores.float().cpu(), examples, strict=True)]

    def sureness(self, scores: Tensor, examples: Sequence[Example]) -> list[float]:
        """How much speaks for each of `texts`: the sum of its two scores, by which rows of one record are compared."""
        return [_best(row, example)[0] for row, example in zip(scores.float().cpu(), examples, strict=True)]

    def metrics(self, truth: Sequence[Any], predicted: Sequence[Any], classes: int) -> AnswerMetrics:
        return compute_answer_metrics([(float(f1), float(exact)) for f1, exact in predicted])

    def read_metrics(self, values: Mapping[str, float]) -> AnswerMetrics:
        return AnswerMetrics(**values)

    def constant(self, held: Sequence[Label], classes: Sequence[str]) -> None:
        """No answer is right most often: the base model with a new head is what training is compared with."""


def _pair(given: object) -> tuple[object, object]:
    return given if isinstance(given, tuple) else (None, given)


def _read_answers(context: str, value: object) -> tuple[tuple[str, ...], int] | str:
    """The true answers and where the first one begins; or the reason why there are none.

    As SQuAD has them, {"text": […], "answer_start": […]}, or a text or texts, of which the first place in the context counts.
    """
    starts: Sequence[object] = ()
    if isinstance(value, dict):
        starts = value.get("answer_start") or ()
        value = value.get("text")
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        return "missing answer"
    found = tuple(str(text).strip() for text in texts)
    said = starts[0] if starts and isinstance(starts[0], int) else -1
    start = said if said >= 0 and context.startswith(found[0], said) else context.find(found[0])
    return (found, start) if start >= 0 else "answer that is not in its context"


def _encode(reader: Any, questions: Sequence[Question], max_length: int) -> list[list[Example]]:
    """The rows of each record. Raises what the tokenizer does, and ValueError as `_windows`."""
    if not questions:
        return []
    found = reader(
        [each.question for each in questions],
        [each.context for each in questions],
        truncation=False,
        padding=False,
        return_offsets_mapping=True,
        verbose=False,  # of texts beyond what the model reads, which are taken in parts
    )
    types = found.get("token_type_ids", [[]] * len(questions))  # none where the tokenizer gives transformers none
    return [
        [
            _example(question, *_pick(places, found["input_ids"][row], types[row], found["offset_mapping"][row], parts))
            for places in _windows(parts, max_length)
        ]
        for row, question in enumerate(questions)
        for parts in [found.sequence_ids(row)]
    ]


def _windows(parts: Sequence[int | None], max_length: int) -> list[list[int]]:
    """The places of the tokens of each row: all that are not of the context, and a part of the context.

    Args:
        parts: For each token 1 where it is of the context.
        max_length: Most tokens of a row.

    Raises:
        ValueError: For a question that leaves no room, or so little that a long context would take rows without end.
    """
    context = [place for place, part in enumerate(parts) if part == 1]
    others = [place for place, part in enumerate(parts) if part != 1]
    room = max_length - len(others)
    if room < 1 or len(context) > room < max_length // _LEAST_SHARE:
        raise ValueError("a question that leaves no room for its context")
    starts = range(0, max(1, len(context) - room // _OVERLAP), max(1, room - room // _OVERLAP))
    cuts = sorted({max(0, min(start, len(context) - room)) for start in starts})  # the last part is as long as the others
    return [sorted([*others, *context[start : start + room]]) for start in cuts]


def _pick(places: Sequence[int], *rows: Sequence[Any]) -> list[list[Any]]:
    """The entries at some places of each row; none of an empty one."""
    return [[row[place] for place in places] if row else [] for row in rows]


def _room_around_answer(example: Example) -> int:
    """Tokens of the context on the side of the answer that has fewer of them; −1 where the answer is not in the row."""
    inside = [label for label in example["labels"] if label != IGNORED]
    marked = [place for place, label in enumerate(inside) if label >= _BEGINS]
    return min(marked[0], len(inside) - 1 - marked[-1]) if marked else -1


def _example(
    question: Question,
    ids: list[int],
    types: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    parts: Sequence[int | None],
) -> Example:
    """Return an encoded record.

    Args:
        question: The record.
        ids: Of its tokens.
        types: Of its tokens, as the tokenizer gives them; empty: all are 0.
        offsets: Of each token in its part of the input.
        parts: 1 for tokens of the context.
    """
    labels = [0 if part == 1 and begin < end else IGNORED for part, (begin, end) in zip(parts, offsets, strict=True)]
    inside = [place for place, label in enumerate(labels) if label != IGNORED]
    if question.answers:
        ends = question.start + len(question.answers[0])
        covering = [place for place in inside if offsets[place][0] < ends and offsets[place][1] > question.start]
        if covering and offsets[covering[0]][0] <= question.start and ends <= offsets[covering[-1]][1]:  # else it is cut off
            labels[covering[0]] |= _BEGINS
            labels[covering[-1]] |= _ENDS
    return {
        "input_ids": ids,
        "labels": labels,
        "types": list(types),
        "offsets": list(offsets),
        "context": question.context,
        "answers": question.answers,
    }


def _marks(labels: Tensor) -> Tensor:
    """(b, l, 2): 1 for the first, and for the last token of an answer."""
    there = labels.clamp(min=0)
    return torch.stack([there & _BEGINS, (there & _ENDS) // _ENDS], dim=-1).float()


def _inside(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores (b, l, 2) with as little as nothing for tokens outside of the context."""
    return scores.masked_fill((labels == IGNORED)[..., None], torch.finfo(scores.dtype).min / 2)


def _best(scores: Tensor, example: Example) -> tuple[float, str]:
    """The part of the context with the highest sum of two scores, of at most `_LONGEST_ANSWER` tokens, after that sum."""
    places = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
    if not places or "offsets" not in example:
        return -math.inf, ""
    begins, ends = scores[places].unbind(dim=1)
    sums = begins[:, None] + ends[None, :]
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(_LONGEST_ANSWER - 1)
    allowed_sums = sums.masked_fill(~allowed, -torch.inf)
    first, last = divmod(int(allowed_sums.argmax()), len(places))
    offsets = example["offsets"]
    text = str(example["context"][offsets[places[first]][0] : offsets[places[last]][1]])
    return float(allowed_sums[first, last]), text
