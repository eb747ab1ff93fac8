"""How good the shared model is on the common test set."""

from __future__ import annotations

import torch

from cotune.models.features import feature_head
from cotune.models.holdings import Holdings
from cotune.models.sharing import SharedModel, State
from cotune.models.tasks import Metrics, logits, score

__all__ = ["evaluate", "predict"]

_BATCH = 64


def evaluate(model: SharedModel, state: State, test: Holdings, precision: str) -> Metrics:
    """Metrics of the model in a state."""
    return score(test.truth, predict(model, state, test, precision), len(test.labels))


@torch.no_grad()
def predict(model: SharedModel, state: State, test: Holdings, precision: str) -> list[int]:
    """What the model in a state tells, in the order of `test.truth`.

    While the encoder is as it came, only the head is computed, on kept features.
    """
    model.load(state)
    head = feature_head(model) if not any(name.startswith(model.prefix) for name in state) else None
    if head is None:
        return _predict(model, test)
    scores = head(test.features(model, state, precision).to(model.device)).logits.float()
    predicted: list[int] = scores.argmax(dim=1).tolist()
    return predicted


def _predict(model: SharedModel, test: Holdings) -> list[int]:
    examples, task = test.examples(model), model.loaded.task
    order = sorted(range(len(examples)), key=lambda i: task.order(examples[i]))
    collate = task.collator(model.module, model.loaded.reader, model.device)
    told: list[tuple[int, ...]] = [()] * len(examples)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = [examples[i] for i in rows]
        for row, answer in zip(rows, task.answers(logits(model.module, collate(batch)), batch), strict=True):
            told[row] = answer
    return [number for answer in told for number in answer]
