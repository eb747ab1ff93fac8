"""The tasks, and what they have in common: the loss of each example, and the metrics of a prediction.

A task is one object, in a file of its own, which answers what the rest of the program must know of it; nobody else tells tasks
apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, device, nn
from torch.nn import functional

from cotune.data.config import TaskName
from cotune.data.readers.data_file import DataFile
from cotune.data.tasks.batching import LENGTHS
from cotune.data.tasks.image import ImageClassification
from cotune.data.tasks.text import IGNORED, Batch, Collate, Example, SequenceClassification
from cotune.data.tasks.token import TokenClassification
from cotune.data.types import Input, Label

Target = int | tuple[int, ...]  # the number of a record's class, or of each word's tag


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

    def model_class(self) -> Any:
        """The class of transformers that loads a model with a head for this task."""

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        """The record with a number in a file, or the reason to leave it out. Raises DataError."""

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        """As `record`, of an input without a label: the label is made up."""

    def reader(self, folder: Path) -> Any:
        """The reader of a model folder. Raises ModelError."""

    def fit(self, reader: Any, module: Any) -> None:
        """Makes reader and model agree. Raises ModelError when they cannot."""

    def longest(self, reader: Any, module: Any, wanted: int) -> int:
        """How many tokens of a record, of the wanted number at most, the model reads."""

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        """What the collator takes, for each record; for one that cannot be encoded, a blank example (see `blank`)."""

    def cut(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        """How many of the inputs are longer than the model reads, so that their ends are not seen."""

    def samples(self, reader: Any) -> list[Example]:
        """Three made-up examples, of unlike lengths where there are lengths; their classes are 0 and 1."""

    def blank(self, reader: Any, length: int) -> Example:
        """What stands in a slot of a batch that has no record: at most `length` long, and labeled IGNORED."""

    def bucket(self, example: Example, max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
        """The length, out of these, of the batches that an example is in: decided by it alone (see `batching`)."""

    def collator(self, module: nn.Module, reader: Any, to: device) -> Collate:
        """Examples -> a batch on the device, with "labels"; of a fixed shape where one is given."""

    def order(self, example: Example) -> tuple[Any, ...]:
        """A key for sorting: like examples stand together, and equal keys mean equal inputs."""

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """The class numbers that a model's scores mean, as many for each example as its target has."""

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        """The model's scores for each answer: (answers, classes) for each example; NaN for an answer that it cannot give."""

    def stand_in(self, features: Tensor, pad: int) -> dict[str, Tensor]:
        """Inputs with which a head alone is called, its encoder answering with the features: (b, d), or (b, t, d) for words."""


_TASKS: dict[str, Task] = {
    "sequence-classification": SequenceClassification(),
    "token-classification": TokenClassification(),
    "image-classification": ImageClassification(),
}


def get_task(name: TaskName) -> Task:
    return _TASKS[name]


@dataclass(frozen=True)
class Metrics:
    """Quality on a test set, each in [0, 1]; precision, recall and F1 are means over the classes (macro).

    Of tags it is the words that are counted, "O" among the classes. A word that a model's length cuts off is one told wrong.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def compute_metrics(truth: Sequence[int], predicted: Sequence[int], classes: int) -> Metrics:
    """Metrics of predicted against true class numbers; a class that is never predicted has precision 0."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support  # its import takes a second

    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=list(range(classes)), average="macro", zero_division=0
    )
    return Metrics(float(accuracy_score(truth, predicted)), float(precision), float(recall), float(f1))


def majority_metrics(train: Sequence[int], truth: Sequence[int], classes: int) -> Metrics:
    """What always answering the most frequent class of the training data reaches."""
    most = max(range(classes), key=lambda c: (list(train).count(c), -c))
    return compute_metrics(truth, [most] * len(truth), classes)


def logits(module: nn.Module, batch: Batch) -> Tensor:
    """The model's scores in float32: (b, classes), or (b, l, classes) where every position has its own."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return cast(Tensor, module(**inputs).logits).float()


def example_losses(module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
    """The loss of each example by itself: (b,). Exactly 0 for one whose every label is IGNORED.

    Cross-entropy; of an example with a label for each position, the mean over its own labeled positions. A mean over the batch's
    would let one record change the gradient of another, which clipping could not bound.

    Args:
        module: The model.
        batch: Examples with their labels.
        weights: (classes,) how much a label of each class counts; None: all the same. Nothing is divided by their sum over the
            batch, for the same reason.
    """
    return losses_from_scores(logits(module, batch), batch["labels"], weights)


def losses_from_scores(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The losses of `example_losses` from scores (b, classes) and labels (b,), or (b, l, classes) and (b, l)."""
    losses = functional.cross_entropy(scores.movedim(-1, 1), labels, weights, ignore_index=IGNORED, reduction="none")
    if labels.dim() == 1:
        return losses
    return losses.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)
