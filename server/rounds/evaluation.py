"""How good the shared model is on the common test set, and what evaluates a run where there is no common model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from cotune.data.dataset import Dataset
from cotune.data.tasks.task import Metrics, compute_metrics, logits
from cotune.models.encoding import encoded_examples, encoded_features
from cotune.models.feature_head import feature_head
from cotune.models.head_fit import classes_from_scores
from cotune.models.trainable import State, TrainableModel
from cotune.observers import Registry

_BATCH = 64
Evaluator = Callable[[State], Metrics | None]
_evaluators = Registry[Evaluator]()


def register_evaluator(evaluator: Evaluator) -> AbstractContextManager[None]:
    """Let runs of this process whose organizations have models of their own be evaluated by a function, during the block."""
    return _evaluators.register(evaluator)


def get_registered_evaluator() -> Evaluator:
    """Return what evaluates such a run; without one, as in a real federation, nobody sees these models."""
    return _evaluators.newest or (lambda _: None)


def evaluate(model: TrainableModel, state: State, test: Dataset, precision: str) -> Metrics:
    """Return metrics of the model in a state on the test set."""
    return compute_metrics(test.truth, predict(model, state, test, precision), len(test.labels))


@torch.no_grad()
def predict(model: TrainableModel, state: State, test: Dataset, precision: str) -> list[int]:
    """Return the class numbers that the model in a state predicts, in the order of `test.truth`.

    While the encoder is as it came, only the head is computed, on kept features.
    """
    model.load(state)
    head = feature_head(model) if not any(name.startswith(model.prefix) for name in state) else None
    if head is None:
        return _predict(model, test)
    return classes_from_scores(head(encoded_features(test, model, state, precision).to(model.device)).logits.float()).tolist()


def _predict(model: TrainableModel, test: Dataset) -> list[int]:
    examples = encoded_examples(test, model)
    task = model.loaded.task
    order = sorted(range(len(examples)), key=lambda i: task.order(examples[i]))
    collate = task.collator(model.module, model.loaded.reader, model.device)
    predicted: list[tuple[int, ...]] = [()] * len(examples)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = [examples[i] for i in rows]
        for row, answer in zip(rows, task.answers(logits(model.module, collate(batch)), batch), strict=True):
            predicted[row] = answer
    return [number for answer in predicted for number in answer]
