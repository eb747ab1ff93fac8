"""The tasks: what a record is, what a model is to predict for it, how far it is from that, and how good it is on a test set.

A task is one object, in a file of its own, which answers what the rest of the program must know of it; nobody else tells tasks
apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, device, dtype, nn

from cotune.data.config import DataConfig, TaskName
from cotune.data.inputs.batching import LENGTHS
from cotune.data.metrics.metrics import Metrics
from cotune.data.readers.data_file import DataFile
from cotune.data.tasks.causal import CausalLanguageModeling
from cotune.data.tasks.classes import Batch
from cotune.data.tasks.image import ImageClassification
from cotune.data.tasks.multi_label import MultiLabelClassification
from cotune.data.tasks.multi_task import MultiTask
from cotune.data.tasks.question import QuestionAnswering
from cotune.data.tasks.regression import Regression
from cotune.data.tasks.seq2seq import SequenceToSequence
from cotune.data.tasks.tagged_multi_task import TaggedMultiTask
from cotune.data.tasks.text import Collate, Example, SequenceClassification
from cotune.data.tasks.token import TokenClassification
from cotune.data.types import Input, Label

Target = int | float | tuple[int, ...]  # the number of a record's class, a number, of each word's tag, or 1 for each label


class Task(Protocol):
    """What the rest of the program asks a task for.

    A reader is what turns inputs into numbers: a tokenizer, or an `ImageProcessor`.
    """

    key: str  # the entry of [data] that names the column of the inputs
    described: str  # the model, as an error calls it
    needs: str  # what else its folder must hold
    pipeline: str  # how `transformers.pipeline` calls it
    problem_type: str | None  # of the exported configuration: which loss and which probabilities the scores are for
    pools: bool  # whether its head reads one vector of a record
    has_several_heads: bool  # whether there is a head for each of several tasks
    keeps_head: bool  # whether the head is the base model's own, so that it is neither new nor a part of every stage
    keeps_trained_head: bool  # whether training goes on from a head that the folder has for the same labels
    floor: str  # what anyone can predict without training, as a model card calls it
    label_dtype: dtype  # of the labels of a batch

    def suited(self, target_range: tuple[float, float] | None, labels: Sequence[str], max_target: int | None = None) -> Task:
        """Return the task for one model.

        Args:
            target_range: The smallest and largest target of regression; None for other tasks.
            labels: Class names in the order of the head.
            max_target: The most tokens of a target; None: as many as the model reads.
        """

    def head_names(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """A name for each output of the head."""

    def finish(self, module: Any) -> None:
        """Changes a copy of the module, its adapters merged, so that what it gives is what people read."""

    def columns(self, config: DataConfig) -> tuple[str, str]:
        """The entries of [data] that name the columns of the inputs and of the targets."""

    def model_class(self) -> Any:
        """The class of transformers that loads a model with a head for this task."""

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        """Return the input and the label of a record, or the reason to leave it out.

        Args:
            file: The file and its columns.
            number: Of the record, from 1; errors name it.
            given: The value of the input's column.
            label: The value of the target's column, or a tuple of several (see `target_columns`).

        Raises:
            DataError: If the value cannot be read, unless the file is read leniently.
        """

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        """Return an input without a label, with a made-up label, or the reason to leave it out.

        Args:
            file: The file and its columns.
            number: Of the record, from 1; errors name it.
            given: The value of the input's column.

        Raises:
            DataError: If the value cannot be read.
        """

    def targets(self, held: Sequence[Label], classes: Sequence[str]) -> list[Any]:
        """What a model is to predict for records with these labels, of each a `Target`; IGNORED for a label that is no class."""

    def is_unknown(self, label: Label, known: Collection[str]) -> bool:
        """Whether a label makes its record one without a loss, as the plan does not list it."""

    def encode_target(self, target: Any) -> Any:
        """The value that stands for a target among the labels of a batch."""

    def missing_target(self, given: Any) -> Any:
        """The target that stands for the unknown one of an input without a label; nothing is learned or measured with it."""

    def label_pool(self, classes: int) -> Tensor:
        """Labels that differ, for made-up records: (k, ...)."""

    def reader(self, folder: Path) -> Any:
        """The reader of a model folder. Raises ModelError."""

    def fit(self, reader: Any, module: Any) -> None:
        """Makes reader and model agree. Raises ModelError when they cannot."""

    def longest(self, reader: Any, module: Any, wanted: int) -> int:
        """Return the most tokens of a record that the model reads, at most the wanted number.

        Args:
            reader: Turns inputs into numbers.
            module: The model.
            wanted: The number of tokens that the plan asks for.
        """

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        """Return what the collator takes for each record; for one that cannot be encoded, a blank example (see `blank`).

        Args:
            reader: Turns inputs into numbers.
            max_length: Most tokens of a record.
            inputs: Of the records.
            targets: As many, each a `Target`.
        """

    def cut(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        """Return the number of inputs that are longer than the model reads, so that their ends are cut off.

        Args:
            reader: Turns inputs into numbers.
            max_length: Most tokens of a record.
            inputs: Of the records.
        """

    def lost(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        """Return the number of inputs whose target is cut off entirely, so that they contribute nothing.

        Args:
            reader: Turns inputs into numbers.
            max_length: Most tokens of a record.
            inputs: Of the records.
        """

    def refused(self, reader: Any, inputs: Sequence[Any]) -> int:
        """How many of them are chats that the chat template cannot write, so that they contribute nothing."""

    def samples(self, reader: Any) -> list[Example]:
        """Three made-up examples, of unlike lengths where there are lengths; their classes are 0 and 1."""

    def blank(self, reader: Any, length: int) -> Example:
        """What stands in a slot of a batch that has no record: at most `length` long, and labeled IGNORED."""

    def bucket(self, example: Example, max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
        """Return the length of the batches that an example is in; it depends on this example alone (see `batching`).

        Args:
            example: An encoded record.
            max_length: Most tokens of a record.
            lengths: Lengths of batches, ascending.
        """

    def collator(self, module: nn.Module, reader: Any, to: device) -> Collate:
        """Return a function from examples to a batch with "labels" on the device; of a fixed shape where one is given.

        Args:
            module: The model.
            reader: Turns inputs into numbers; knows the padding.
            to: The device of the batches.
        """

    def order(self, example: Example) -> tuple[Any, ...]:
        """A key for sorting: like examples stand together, and equal keys mean equal inputs."""

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        """What a model's scores mean, as many answers for each example as its target has: class numbers, if it has classes."""

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        """The model's scores for each answer: (answers, classes) for each example; NaN for an answer that it cannot give."""

    def losses(self, module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
        """The loss of each example by itself: (b,). Exactly 0 for one without a target.

        A mean over the targets of a batch would let one record change the gradient of another, which clipping could not bound.

        Args:
            module: The model.
            batch: Examples with their labels.
            weights: (classes,) how much a label of each class counts; None: all the same.
        """

    def losses_from_scores(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the losses from scores, for a task whose head can be trained on features.

        Args:
            scores: Of a head on features, (b, outputs).
            labels: As in a batch.
            weights: (classes,) how much a label of each class counts; None: all the same.

        Returns:
            (b,) the loss of each row; exactly 0 for one without a target.
        """

    def scores(self, module: nn.Module, batch: Batch) -> Tensor:
        """What the model says of each slot, in float32: (b, ...)."""

    def answers_from_scores(self, scores: Tensor) -> list[Any]:
        """What scores (n, outputs) of a head on features mean, one after the other as in `Dataset.truth`."""

    def are_right(self, scores: Tensor, labels: Tensor) -> Tensor:
        """(b,) which slots are predicted correctly, by their `scores`; those without a target always are."""

    def metrics(self, truth: Sequence[Any], predicted: Sequence[Any], classes: int) -> Metrics:
        """How good `answers` are on a test set.

        Args:
            truth: Of `Dataset.truth`.
            predicted: As many answers.
            classes: How many there are.
        """

    def read_metrics(self, values: Mapping[str, float]) -> Metrics:
        """Metrics from their `as_dict`."""

    def constant(self, held: Sequence[Label], classes: Sequence[str]) -> Any:
        """The one answer that is right most often for these labels; None where there is none such.

        Of several tasks a tuple: for each class, the one answer to the task that it belongs to.
        """

    def stand_in(self, features: Tensor, pad: int) -> dict[str, Tensor]:
        """Inputs with which a head alone is called, its encoder answering with the features: (b, d), or (b, t, d) for words."""


_TASKS: dict[str, Task] = {
    "sequence-classification": SequenceClassification(),
    "token-classification": TokenClassification(),
    "image-classification": ImageClassification(),
    "multi-label": MultiLabelClassification(),
    "regression": Regression(),
    "causal-lm": CausalLanguageModeling(),
    "seq2seq": SequenceToSequence(),
    "question-answering": QuestionAnswering(),
    "multi-task": MultiTask(SequenceClassification()),
    "multi-task-images": MultiTask(ImageClassification()),
    "multi-task-tags": TaggedMultiTask(),
}


def get_task(name: TaskName) -> Task:
    return _TASKS[name]
