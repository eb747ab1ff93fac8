"""Several tasks on one input: each record goes through the head of every task, and counts where it has a label.

A record's loss is Σ λ_i ℓ_i over the tasks that it has a label of: min over θ of Σ_i λ_i L(D_i, θ) with a shared encoder
(Caruana, Machine Learning 1997, https://doi.org/10.1023/A:1007379606734). λ_i is part of the weights of a task's classes. All
heads see all rows of a batch, so that no shape depends on which tasks the records in it are of; a row without a label of a task
has a loss of exactly 0 there, and no gradient.

Classes are numbered through over all tasks: scores are (b, classes of all tasks), labels (b, tasks).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cotune.data.class_names import class_name
from cotune.data.config import DataConfig
from cotune.data.inputs.batching import LENGTHS
from cotune.data.metrics.metrics import MultiTaskMetrics, compute_metrics
from cotune.data.multi_task import qualify, split_labels, task_of
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.tasks.classes import IGNORED, Batch, ClassTargets, all_correct, logits, losses_from_scores
from cotune.data.tasks.image import ImageClassification
from cotune.data.tasks.text import Collate, Example, SequenceClassification
from cotune.data.types import Input, Label, class_names_in
from cotune.errors import DataError

_PLACEHOLDER = "-"  # a label, of which only the input is wanted
_NOT_TOLD = -1  # the answer for a task whose classes do not have the record's label


@dataclass(frozen=True)
class Block:
    """The classes of one task among those of all: from `start` to before `stop`."""

    task: str
    start: int
    stop: int


class MultiTask(ClassTargets):
    """See `tasks.Task`. An example has "asked" beside its input: the number of the task that each of its labels is of, or None.

    Args:
        one: What each of the tasks is by itself.
        labels: Qualified class names of all tasks; empty: the object reads records, and answers nothing about a model.
    """

    needs: str
    pools = True
    keeps_head = False
    has_several_heads = True

    def __init__(self, one: SequenceClassification | ImageClassification, labels: Sequence[str] = ()) -> None:
        self.one = one
        self.key = one.key
        self.needs = one.needs
        self.pipeline = one.pipeline
        self.problem_type = one.problem_type
        self.blocks = tuple(_blocks(labels))
        named = ", ".join(f"{block.task}: {block.stop - block.start}" for block in self.blocks)
        self.described = f"{one.described} of several tasks" + (f" ({named})" if named else "")

    def for_labels(self, labels: Sequence[str], tags: Collection[str] = ()) -> MultiTask:
        """Return the same for a model whose heads have these classes.

        Args:
            labels: Qualified class names of all tasks.
            tags: The tasks that have a tag for each word.
        """
        return MultiTask(self.one, labels)

    def part(self, task: str) -> SequenceClassification | ImageClassification:
        """Return what one of the tasks is by itself."""
        return self.one

    def columns(self, config: DataConfig) -> tuple[str, str]:
        return self.one.key, "tasks"

    def model_class(self) -> Any:
        return self.one.model_class()

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        """An empty cell is no label of that task; a record needs one of any task."""
        found = self.one.record(file, number, given, _PLACEHOLDER)
        if isinstance(found, str):
            return found
        if not isinstance(label, tuple):
            raise DataError(f"{file.name} has no labels of several tasks in record {number}", code="data.wrong_type")
        read = [
            (task, class_name(format_value(file, column, number, cell)))
            for (task, column), cell in zip(file.config.tasks, label, strict=True)
        ]
        names = tuple(qualify(task, name) for task, name in read if name)
        if not names:
            return "missing label"
        return (found[0], names) if all(map(is_unicode, names)) else "broken Unicode"

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        return self.one.unlabeled(file, number, given)

    def missing_target(self, given: Any) -> tuple[int, ...]:
        return ()

    def reader(self, folder: Path) -> Any:
        return self.one.reader(folder)

    def fit(self, reader: Any, module: Any) -> None:
        """Each head was loaded as a model of its own task, and made to agree with the reader then."""

    def longest(self, reader: Any, module: Any, wanted: int) -> int:
        return self.one.longest(reader, module, wanted)

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        """Targets are the class numbers of each record's labels."""
        read = self.one.examples(reader, max_length, inputs, [0] * len(inputs))
        return [
            {
                **example,
                "labels": self._by_task(numbers if example["labels"] != IGNORED else ()),
                "asked": tuple(map(self._task_number, numbers)),
            }
            for example, numbers in zip(read, targets, strict=True)
        ]

    def _task_number(self, number: int) -> int | None:
        return next((i for i, block in enumerate(self.blocks) if block.start <= number < block.stop), None)

    def _by_task(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """The class number of each task; IGNORED where there is none."""
        found = {self._task_number(number): number for number in numbers}
        return tuple(found.get(i, IGNORED) for i in range(len(self.blocks)))

    def cut(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        return self.one.cut(reader, max_length, inputs)

    def lost(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        return 0

    def samples(self, reader: Any) -> list[Example]:
        """Each has a label of every task."""
        return [
            {**example, "labels": tuple(block.start + example["labels"] for block in self.blocks)}
            for example in self.one.samples(reader)
        ]

    def blank(self, reader: Any, length: int) -> Example:
        return self.one.blank(reader, length)

    def bucket(self, example: Example, max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
        return self.one.bucket(example, max_length, lengths)

    def collator(self, module: nn.Module, reader: Any, to: torch.device) -> Collate:
        """The collator of one task numbers the examples instead of labeling them, and what it made blank has no label here."""
        collate_one = self.one.collator(next(heads_of(module)), reader, to)  # which says what its forward pass takes

        def collate(examples: Sequence[Example], length: int | None = None, slots: int | None = None) -> Batch:
            rows = [self._row(example["labels"]) for example in examples]
            numbered = [
                {**example, "labels": IGNORED if example["labels"] == IGNORED else i} for i, example in enumerate(examples)
            ]
            batch = collate_one(numbered, length, slots)
            labels = torch.tensor([*rows, [IGNORED] * len(self.blocks)], device=to)  # the last one of those without an example
            return {**batch, "labels": labels[batch["labels"].clamp(min=-1)]}

        return collate

    def _row(self, labels: int | tuple[int, ...]) -> list[int]:
        return list(self._by_task((labels,)) if isinstance(labels, int) else labels)

    def order(self, example: Example) -> tuple[Any, ...]:
        return self.one.order(example)

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        best = torch.stack([b.start + scores[:, b.start : b.stop].argmax(dim=1) for b in self.blocks], dim=1).tolist()
        return [
            tuple(_NOT_TOLD if task is None else row[task] for task in example["asked"])
            for row, example in zip(best, examples, strict=True)
        ]

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        """Of the classes of other tasks there is no score for an answer."""
        outside = torch.full((len(self.blocks) + 1, scores.shape[1]), torch.nan, device=scores.device)
        for i, block in enumerate(self.blocks):
            outside[i, block.start : block.stop] = 0.0
        return [
            row + outside[[len(self.blocks) if task is None else task for task in example["asked"]]]
            for row, example in zip(scores, examples, strict=True)
        ]

    def losses(self, module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
        return self.losses_from_scores(logits(module, batch), batch["labels"], weights)

    def losses_from_scores(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        return torch.stack(list(self._losses(scores, labels, weights))).sum(dim=0)

    def _losses(self, scores: Tensor, labels: Tensor, weights: Tensor | None) -> Iterator[Tensor]:
        for i, block in enumerate(self.blocks):
            own = None if weights is None else weights[block.start : block.stop]
            yield losses_from_scores(scores[..., block.start : block.stop], self._own_numbers(labels, i), own)

    def _own_numbers(self, labels: Tensor, task: int) -> Tensor:
        return torch.where(labels[..., task] == IGNORED, IGNORED, labels[..., task] - self.blocks[task].start)

    def scores(self, module: nn.Module, batch: Batch) -> Tensor:
        return logits(module, batch)

    def are_right(self, scores: Tensor, labels: Tensor) -> Tensor:
        """A record is predicted correctly where all of its labels are."""
        right = [all_correct(scores[..., b.start : b.stop], self._own_numbers(labels, i)) for i, b in enumerate(self.blocks)]
        return torch.stack(right).all(dim=0)

    def metrics(self, truth: Sequence[Any], predicted: Sequence[Any], classes: int) -> MultiTaskMetrics:
        """Of the tasks that have a label in the test set."""
        found = {}
        for block in self.blocks:
            pairs = [
                (t - block.start, a - block.start) for t, a in zip(truth, predicted, strict=True) if block.start <= t < block.stop
            ]
            if pairs:
                true, answered = zip(*pairs, strict=True)
                found[block.task] = compute_metrics(true, answered, block.stop - block.start)
        return MultiTaskMetrics(found)

    def read_metrics(self, values: Mapping[str, float]) -> MultiTaskMetrics:
        return MultiTaskMetrics.read(values)

    def constant(self, held: Sequence[Label], classes: Sequence[str]) -> tuple[int, ...]:
        """For each class, the class of its task that most labels have."""
        counts = dict.fromkeys(classes, 0)
        for label in held:
            for name in class_names_in(label):
                counts[name] = counts.get(name, 0) + 1
        best: dict[str, int] = {}
        for number, name in enumerate(classes):
            if task_of(name) not in best or counts[name] > counts[classes[best[task_of(name)]]]:
                best[task_of(name)] = number
        return tuple(best[task_of(name)] for name in classes)

    def stand_in(self, features: Tensor, pad: int) -> dict[str, Tensor]:
        return self.one.stand_in(features, pad)


def heads_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the classifiers of the tasks, one after the other; a module that is one by itself."""
    tasks = getattr(module, "tasks", None)
    yield from (module.head(task) for task in tasks) if tasks else [module]  # type: ignore[operator]


def _blocks(labels: Sequence[str]) -> Iterator[Block]:
    start = 0
    for task, names in split_labels(labels).items():
        yield Block(task, start, start + len(names))
        start += len(names)
