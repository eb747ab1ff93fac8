"""Predict and evaluate the common test set, and compute the baseline it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cotune.data.dataset import Dataset
from cotune.data.metrics.metrics import Metrics
from cotune.data.tasks.classes import count_labels
from cotune.data.tasks.text import Example
from cotune.data.types import Label
from cotune.models.device import autocasts
from cotune.models.encoding import encoded_features
from cotune.models.evaluation.evaluated_rows import EvaluatedRows, SurestAnswers
from cotune.models.features.head import feature_head
from cotune.models.features.kept_states import StateReader, attach_states, get_states, is_small
from cotune.models.features.lower_layers import LowerLayers, find_lower_layers
from cotune.models.physical_batch import FEWEST_SLOTS, PhysicalBatch, open_batch
from cotune.models.trainable import State, TrainableModel

_BATCH = 64  # rows at a time, or fewer if they do not fit into memory
ROWS_ABOVE = 32  # the same where hidden states of what is below are kept


def evaluate(model: TrainableModel, state: State, test: Dataset, precision: str, rows: int | None = None) -> Metrics:
    """Return the metrics of a model in a state on the test set; for the arguments see `predict`.

    Args:
        model: The model, which is set to the state.
        state: Its trained parameters by name.
        test: The records.
        precision: As in the plan.
        rows: As in the plan.

    Raises:
        DataError: If the records have classes that the plan does not list.
    """
    return measure(model, test, predict(model, state, test, precision, rows))


def measure(model: TrainableModel, test: Dataset, predicted: Sequence[Any]) -> Metrics:
    """Return the metrics of a model's predictions on the test set, in the order of `test.truth`.

    Args:
        model: Its task decides which metrics there are.
        test: The records.
        predicted: As many answers as `test.truth` has.
    """
    return model.loaded.task.metrics(test.truth, predicted, len(test.labels))


@dataclass(frozen=True)
class Floor:
    """The best constant prediction for the test set, with which every model is compared."""

    model: TrainableModel
    test: Dataset
    precision: str
    rows: int | None = None

    def answers(self, held: Sequence[Label]) -> list[Any]:
        """Return the one answer that is right most often for the labels `held`; where there is none such, the base model's."""
        constant = self.model.loaded.task.constant(held, self.test.labels)
        if constant is None:
            return self._untrained
        if self.model.loaded.task.has_several_heads:
            return [constant[number] for number in self.test.truth]
        entries = constant if isinstance(constant, tuple) else (constant,)
        return list(entries) * (len(self.test.truth) // len(entries))

    @cached_property
    def _untrained(self) -> list[Any]:
        return predict(self.model, {}, self.test, self.precision, self.rows)


@torch.no_grad()
def predict(model: TrainableModel, state: State, test: Dataset, precision: str, rows: int | None = None) -> list[Any]:
    """Return a model's predictions, such as class numbers, in the order of `test.truth`.

    If the encoder is still that of the base model, only the head is computed, on cached features.

    Args:
        model: The state is loaded into it.
        state: Parameter -> value.
        test: The test set.
        precision: Of the encoder's arithmetic.
        rows: Held in memory at a time where the plan trains (`Plan.physical_rows`): hidden states that are kept are computed in
            batches of that shape, once for both. Default, and where that does not fit: 32, or fewer.
    """
    model.load(state)
    head = feature_head(model) if not any(name.startswith(model.prefix) for name in state) else None
    if head is None:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocasts(precision, model.device)):
            low = autocasts(precision, model.device)
            judged = EvaluatedRows.of(model.loaded, test.inputs(), test.targets)
            lower = find_kept_layers(model, state, test) if judged.are_records else None
            if lower is None:
                return _predict(model, judged, open_batch(model, "evaluation", _BATCH, least=1))
            physical = open_batch(model, "evaluation above kept states", ROWS_ABOVE, least=FEWEST_SLOTS)

            def score() -> list[Any]:
                held = rows or physical.rows
                if physical.rows < ROWS_ABOVE:  # memory has run out here, be it by the plan's rows
                    held = min(held, physical.rows)
                reader = StateReader(model, lower, max(FEWEST_SLOTS, held), low)
                return _predict_above(reader, test, judged.examples, state, physical.rows)

            return physical.fit(score)
    scores = head(encoded_features(test, model, state, precision).to(model.device)).logits.float()
    return model.loaded.task.answers_from_scores(scores)


def _predict(model: TrainableModel, rows: EvaluatedRows, physical: PhysicalBatch) -> list[Any]:
    loaded = model.loaded
    task = loaded.task
    left = sorted(range(len(rows.examples)), key=lambda row: task.order(rows.examples[row]))
    collate = task.collator(model.module, loaded.reader, model.device)
    found = SurestAnswers[tuple[Any, ...]](rows)

    def score_next() -> tuple[Tensor, Sequence[tuple[Any, ...]]]:
        batch = [rows.examples[row] for row in left[: physical.rows]]
        scores = task.scores(model.module, collate(batch))
        return scores, task.answers(scores, batch)

    while left:
        scores, answers = physical.fit(score_next)
        found.offer(loaded, left[: len(answers)], scores, answers)
        del left[: len(answers)]
    return [each for answers in found.in_order() for each in answers]


def find_kept_layers(model: TrainableModel, state: State, test: Dataset) -> LowerLayers | None:
    """Return what is below the adapters, where the state has changed nothing there: it is the same for every state of a run.

    Args:
        model: The model.
        state: Its trained parameters by name.
        test: The records; None is the answer where the states of their files are too large to be kept.
    """
    if model.lora is None or not is_small(model, test):
        return None
    lower = find_lower_layers(model, model.adapter_names())
    return None if lower is None or lower.trained_below(state) else lower


def _predict_above(reader: StateReader, test: Dataset, examples: Sequence[Example], state: State, slots: int) -> list[Any]:
    """examples: Of the records of the test set, a row each; slots: Of a batch above the states that the reader reads."""
    loaded = reader.model.loaded
    collate = loaded.task.collator(reader.model.module, loaded.reader, reader.model.device)
    states = get_states(reader, test, state)
    predicted: list[tuple[Any, ...]] = [()] * len(examples)
    order = sorted(range(len(examples)), key=lambda row: count_labels(examples[row]["labels"]))
    for places, length in replace(reader, slots=slots).rows_of_batches([examples[row] for row in order]):
        rows = [order[place] for place in places]
        chosen = [examples[row] for row in rows]
        batch = attach_states(collate(chosen, length, slots), [states[row] for row in rows])
        with reader.lower.skipped(batch) as rest:
            scores = loaded.task.scores(reader.model.module, rest)[: len(rows)]
        for row, answer in zip(rows, loaded.task.answers(scores, chosen), strict=True):
            predicted[row] = answer
    return [each for answers in predicted for each in answers]
