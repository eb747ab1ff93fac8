"""Several tasks on one text, of which some have a tag for each word, such as entities beside a topic.

Every record is a text of words, read once. Scores are (b, l, classes of all tasks) and labels (b, l, tasks): a tag stands at the
first token of its word, and the class of the whole text at the first position, where alone its scores are looked at. A record's
loss in a task is the mean over its own labels there, so that a long text weighs no more than a short one; over the tasks it is
summed with their λ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotune.data.class_names import class_name
from cotune.data.multi_task import qualify
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.multi_task import Block, MultiTask, heads_of
from cotune.data.tasks.text import Collate, Example, SequenceClassification, collator
from cotune.data.tasks.token import NOT_PREDICTED, TokenClassification, check_tag_count, read_words
from cotune.data.types import Input, Label
from cotune.errors import DataError

_FIRST = (0,)  # where the class of a whole text stands


class TaggedMultiTask(MultiTask):
    """See `tasks.Task`, and `MultiTask`. An example has "starts", too: the position of each word's first token, or None.

    Args:
        labels: Qualified class names of all tasks.
        tags: The tasks that have a tag for each word.
    """

    pools = False

    def __init__(self, labels: Sequence[str] = (), tags: Collection[str] = ()) -> None:
        super().__init__(TokenClassification(), labels)
        self.tags = frozenset(tags)

    def for_labels(self, labels: Sequence[str], tags: Collection[str] = ()) -> TaggedMultiTask:
        return TaggedMultiTask(labels, tags)

    def part(self, task: str) -> SequenceClassification:
        return TokenClassification() if task in self.tags else SequenceClassification()

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        """An empty cell is no label of that task; a record needs one of any task, and where it has tags one for each word."""
        found = self.one.unlabeled(file, number, given)
        if isinstance(found, str):
            return found
        if not isinstance(label, tuple):
            raise DataError(f"{file.name} has no labels of several tasks in record {number}", code="data.wrong_type")
        words = found[0]
        assert isinstance(words, tuple), "a text of words"
        names: list[str] = []
        for (task, column), cell in zip(file.config.tasks, label, strict=True):
            own = self._read_labels(file, task, column, number, cell)
            if task in file.config.tags and own:
                check_tag_count(file, number, words, own)
            if not all(own):
                return "missing tag"
            names += [qualify(task, name) for name in own]
        if not names:
            return "missing label"
        return (words, tuple(names)) if all(map(is_unicode, names)) else "broken Unicode"

    def _read_labels(self, file: DataFile, task: str, column: str, number: int, cell: object) -> tuple[str, ...]:
        """The class names that a cell holds: one for each word, one, or none."""
        if task in file.config.tags:
            return tuple(map(class_name, read_words(file, column, number, cell)))
        name = class_name(format_value(file, column, number, cell))
        return (name,) if name else ()

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        """Targets are the class numbers of each record's labels, those of a task one after the other."""
        read = self.one.examples(reader, max_length, inputs, list(map(self.one.missing_target, inputs)))
        return [
            {**example, "labels": self._by_position(example, numbers), "asked": tuple(map(self._task_number, numbers))}
            for example, numbers in zip(read, targets, strict=True)
        ]

    def _by_position(self, example: Example, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """The class number of each task at each token, IGNORED where there is none; none at all of what cannot be read."""
        columns = []
        for block in self.blocks:
            column = [IGNORED] * len(example["input_ids"])
            for place, number in self._placed(block, example, numbers):
                column[place] = number
            columns.append(column)
        return list(zip(*columns, strict=True))

    def _placed(self, block: Block, example: Example, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Position and class number of each label of a task; none where tags are missing, as which is whose is not known."""
        starts = example["starts"]
        own = [number for number in numbers if block.start <= number < block.stop]
        places = starts if block.task in self.tags else _FIRST
        if len(own) == len(places) and any(start is not None for start in starts):
            yield from ((place, number) for place, number in zip(places, own, strict=True) if place is not None)

    def samples(self, reader: Any) -> list[Example]:
        """Each has a label of every task at each of its words, also of tasks of whole texts: their loss is the mean over all."""
        rows = self.one.samples(reader)
        return [{**row, "labels": [self._sample_label(label) for label in row["labels"]]} for row in rows]

    def _sample_label(self, label: int) -> tuple[int, ...]:
        return tuple(IGNORED if label == IGNORED else block.start + label for block in self.blocks)

    def blank(self, reader: Any, length: int) -> Example:
        """A row without labels."""
        row = self.one.blank(reader, length)
        return {**row, "labels": [(IGNORED,) * len(self.blocks) for _ in row["input_ids"]]}

    def collator(self, module: nn.Module, reader: Any, to: torch.device) -> Collate:
        """The collator of whole texts numbers the examples, and what it made blank has no label."""
        collate_one = collator(next(heads_of(module)), reader, to)

        def collate(examples: Sequence[Example], length: int | None = None, slots: int | None = None) -> Batch:
            batch = collate_one([{**example, "labels": i} for i, example in enumerate(examples)], length, slots)
            longest = batch["input_ids"].shape[1]
            nothing = (IGNORED,) * len(self.blocks)
            rows = [[*example["labels"], *[nothing] * longest][:longest] for example in examples]
            labels = torch.tensor([*rows, [nothing] * longest], device=to)  # the last one of those without an example
            return {**batch, "labels": labels[batch["labels"].clamp(min=-1)]}

        return collate

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        best = torch.stack([b.start + scores[:, :, b.start : b.stop].argmax(dim=2) for b in self.blocks], dim=2).tolist()
        return [
            tuple(NOT_PREDICTED if place is None else row[place[0]][place[1]] for place in self._asked(example))
            for row, example in zip(best, examples, strict=True)
        ]

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        """Of the classes of other tasks there is no score for an answer."""
        unread = torch.full_like(scores[0, 0], torch.nan)
        outside = torch.full((len(self.blocks), scores.shape[2]), torch.nan, device=scores.device)
        for i, block in enumerate(self.blocks):
            outside[i, block.start : block.stop] = 0.0
        return [
            torch.stack([unread if at is None else row[at[0]] + outside[at[1]] for at in self._asked(example)])
            for row, example in zip(scores, examples, strict=True)
        ]

    def _asked(self, example: Example) -> Iterator[tuple[int, int] | None]:
        """Position and task of each answer, in the order of the record's labels; None for a word that is not read."""
        asked = example["asked"]
        words = {i: iter(example["starts"]) for i, block in enumerate(self.blocks) if block.task in self.tags}
        whole = {i for i in words if asked.count(i) == len(example["starts"])}
        for task in asked:
            place = (next(words[task]) if task in whole else None) if task is None or task in words else 0
            yield None if place is None or task is None else (place, task)
