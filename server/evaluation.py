"""How good the shared model is on the common test set."""

from __future__ import annotations

import torch

from cotune.models.features import feature_head
from cotune.models.holdings import Holdings
from cotune.models.sharing import SharedModel, State
from cotune.models.tasks import Metrics, collator, logits, score

__all__ = ["evaluate"]

_BATCH = 64


@torch.no_grad()
def evaluate(model: SharedModel, state: State, test: Holdings, precision: str) -> Metrics:
    """Metrics of the model in a state. While the encoder is as it came, only the head is computed, on kept features."""
    model.load(state)
    head = feature_head(model) if not any(name.startswith(model.prefix) for name in state) else None
    if head is not None:
        scores = head(test.features(model, state, precision).to(model.device)).logits.float()
        predicted = scores.argmax(dim=1).tolist()
    else:
        predicted = _predict(model, test)
    return score(test.targets, predicted, len(test.labels))


def _predict(model: SharedModel, test: Holdings) -> list[int]:
    examples = test.examples(model)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    collate = collator(model.module, model.loaded.tokenizer, model.device)
    predicted = [0] * len(examples)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        for row, label in zip(
            rows, logits(model.module, collate([examples[i] for i in rows])).argmax(dim=1).tolist(), strict=True
        ):
            predicted[row] = label
    return predicted
