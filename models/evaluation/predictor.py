"""Open a finished model with its head for prediction, and evaluate it on labeled records.

Only configuration, tokenizer (or image processor) and safetensors are read; custom code is never executed. Metrics are those of
`quality`; for tags, those of whole entities, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cotune.data.class_names import shown
from cotune.data.config import TaskName
from cotune.data.inputs.batching import sorted_batches
from cotune.data.records import Records
from cotune.data.tasks.classes import IGNORED, Batch, logits
from cotune.data.tasks.question import QuestionAnswering
from cotune.data.tasks.task import get_task
from cotune.data.tasks.text import Example
from cotune.data.types import Input, Label, Question, class_names_in
from cotune.errors import DataError, nearest
from cotune.models.base.finished import load_single
from cotune.models.base.folder import is_fused
from cotune.models.base.load import LoadedModel
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.device import pick_device
from cotune.models.evaluation.evaluated_rows import EvaluatedRows, SurestAnswers
from cotune.models.evaluation.quality import NOT_PREDICTED, Threshold, entity_quality, predict_classes, quality
from cotune.models.features.stacked_folder import load_stacked_model
from cotune.models.trainable import TrainableModel

_BATCH = 64
_Answer = TypeVar("_Answer")


class Classifier(Protocol):
    """Predicts classes: a single model, or several fused ones."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities."""

    @property
    def task(self) -> TaskName:
        """What it is for."""

    @property
    def max_length(self) -> int:
        """Tokens that it reads of a text."""

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) over the files that decide what it predicts."""

    def probabilities(self, inputs: Sequence[Input]) -> list[Tensor]:
        """Return for each input (answers, classes) in float64: one row, or one for each word; NaN for what was not read."""


@dataclass(frozen=True)
class Predictor:
    """A finished model.

    Attributes:
        model: In the state of its folder.
        labels: Class names in the order of the head.
        task: What it is for.
    """

    model: TrainableModel
    labels: tuple[str, ...]
    task: TaskName

    @property
    def max_length(self) -> int:
        """Tokens that it reads of a text."""
        return self.model.loaded.max_length

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) over the files that decide what it predicts."""
        return self.model.loaded.folder.content_hash

    @torch.no_grad()
    def probabilities(self, inputs: Sequence[Input]) -> list[Tensor]:
        """Return for each input (answers, classes) in float64: one row, or one for each word; NaN for what was not read."""
        loaded = self.model.loaded
        examples = loaded.encode_unlabeled(inputs)
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        for rows in sorted_batches(range(len(examples)), lambda row: loaded.task.order(examples[row]), _BATCH):
            for row, scores in zip(rows, compute_answer_scores(self.model, [examples[row] for row in rows]), strict=True):
                found[row] = functional.softmax(scores.double(), dim=-1).cpu()
        return found

    @torch.no_grad()
    def answer_texts(self, inputs: Sequence[Question]) -> list[str | None]:
        """Return for each question the part of its context that answers it; None for one that cannot be read."""
        task = self.model.loaded.task
        assert isinstance(task, QuestionAnswering), "a model that answers questions"
        return [text or None for text in self._answer(inputs, lambda _, scores, chosen: task.texts(scores, chosen))]

    @torch.no_grad()
    def answers(self, inputs: Sequence[Input]) -> list[tuple[Any, ...] | None]:
        """Return for each input what the task's `answers` give of it; None for one that cannot be read."""

        def answer(batch: Batch, scores: Tensor, chosen: Sequence[Example]) -> list[tuple[Any, ...] | None]:
            unread = (batch["labels"] == IGNORED).reshape(len(chosen), -1).all(dim=1).tolist()
            given = self.model.loaded.task.answers(scores, chosen)
            return [None if lost else each for each, lost in zip(given, unread, strict=True)]

        return self._answer(inputs, answer)

    def _answer(
        self, inputs: Sequence[Input], answer: Callable[[Batch, Tensor, Sequence[Example]], Sequence[_Answer]]
    ) -> list[_Answer]:
        """answer: (a batch, its scores, its examples) -> what is answered in each of its rows."""
        loaded = self.model.loaded
        rows = EvaluatedRows.of(loaded, inputs, list(map(loaded.task.missing_target, inputs)))
        collate = loaded.task.collator(self.model.module, loaded.reader, self.model.device)
        found = SurestAnswers[_Answer](rows)
        for places in sorted_batches(range(len(rows.examples)), lambda row: loaded.task.order(rows.examples[row]), _BATCH):
            chosen = [rows.examples[row] for row in places]
            batch = collate(chosen)
            scores = loaded.task.scores(self.model.module, batch)
            found.offer(loaded, places, scores, answer(batch, scores, chosen))
        return found.in_order()


def compute_answer_scores(model: TrainableModel, examples: Sequence[Example]) -> list[Tensor]:
    """Return the scores (answers, classes) of each example of a batch, with their gradients; NaN for what was not read."""
    loaded = model.loaded
    collate = loaded.task.collator(model.module, loaded.reader, model.device)
    return loaded.task.answer_scores(logits(model.module, collate(examples)), examples)


def open_predictor(source: str, device: str = "auto", max_length: int | None = None) -> Predictor:
    """Open a model.

    Args:
        source: Its folder, the folder of a run with `model/` in it, or a Hugging Face hub id.
        device: auto, cpu, cuda or cuda:N.
        max_length: Tokens to read of a text; None: as many as in training, as far as the folder says so.

    Raises:
        ModelError: When it cannot be used, or has no trained head.
        DeviceError: When the device is not here.
    """
    to = pick_device(device)
    loaded, labels, task = load_finished(folder_of(source), max_length)
    return Predictor(TrainableModel(loaded, None, 0, to), labels, task)


def load_finished(source: str, max_length: int | None = None) -> tuple[LoadedModel, tuple[str, ...], TaskName]:
    """Return a finished model with its labels and task; a fused one if stacking fuses it. Raises ModelError."""
    if is_fused(Path(source).expanduser()):
        loaded, labels = load_stacked_model(find_base(ModelConfig(base=source)), max_length)
        return loaded, labels, "sequence-classification"
    return load_single(source, max_length)


def folder_of(source: str) -> str:
    """Return the model in the folder of a run, or the folder itself."""
    folder = Path(source).expanduser()
    inner = folder / "model"
    return str(inner) if not _is_model(folder) and _is_model(inner) else source


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_fused(folder)


_SHOWN = 5  # unknown classes that an error names
_NO_TAG = "O"


def evaluate_classifier(predictor: Classifier, records: Records, threshold: Threshold | None = None) -> dict[str, Any]:
    """Evaluate a model on labeled records, and return the metrics as plain values.

    Args:
        predictor: The model.
        records: Labeled records.
        threshold: Of one class; None: predict the most probable class.

    Raises:
        DataError: If the records have classes that the model does not have.
    """
    truth = class_numbers(records.labels, predictor.labels, records.source)
    rows = predictor.probabilities(records.inputs)
    lengths = [len(each) for each in truth]
    probabilities = torch.cat(rows).numpy()
    units = np.repeat(unit_numbers(records), lengths)
    found = quality(np.concatenate(truth), probabilities, units, predictor.labels, threshold)
    if predictor.task == "token-classification":
        found["entities"] = _entities(
            records.labels, predict_classes(probabilities, predictor.labels, threshold), predictor.labels
        )
    return {
        "task": predictor.task,
        "labels": list(predictor.labels),
        "max_length": predictor.max_length if get_task(predictor.task).key == "text" else None,
        "records": len(records),
        "left_out": dict(records.skipped),
        **found,
    }


def class_numbers(labels: Sequence[Label], known: Sequence[str], source: str) -> list[NDArray[np.int64]]:
    """Return the class number of each record, or those of its tags.

    Args:
        labels: Of each record.
        known: The model's classes.
        source: Of the records, for the error.

    Raises:
        DataError: If a class is not known.
    """
    number = {label: i for i, label in enumerate(known)}
    strange = sorted({name for label in labels for name in class_names_in(label)} - number.keys())
    if strange:
        named = ", ".join(map(shown, strange[:_SHOWN])) + (f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else "")
        raise DataError(
            f"{source} holds classes that the model does not have ({named}): rename them, or drop their records"
            f"{nearest(strange[0], known)}",
            code="data.unknown_class",
        )
    return [np.asarray([number[name] for name in class_names_in(label)], dtype=np.int64) for label in labels]


def unit_numbers(records: Records) -> NDArray[np.int64]:
    """Return the number of each record's unit: itself, or whose it is."""
    if not records.units:
        return np.arange(len(records))
    numbers = {name: i for i, name in enumerate(dict.fromkeys(records.units))}
    return np.asarray([numbers[name] for name in records.units], dtype=np.int64)


def _entities(labels: Sequence[Label], predicted: NDArray[np.int64], known: Sequence[str]) -> dict[str, Any]:
    names = [*known, _NO_TAG]  # the last one, which NOT_PREDICTED is the number of: a word that was not read is in no entity
    assert NOT_PREDICTED == -1
    ends = np.cumsum([len(class_names_in(label)) for label in labels])[:-1]
    said = [[names[int(number)] for number in part] for part in np.split(predicted, ends)]
    return entity_quality([list(class_names_in(label)) for label in labels], said)
