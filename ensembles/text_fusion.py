"""Fuse language models of one tokenizer: the weighted mean of their probabilities of the next token, measured on texts.

p(y_t | y_<t) = Σ_k w_k p_k(y_t | y_<t), with equal weights, or with those on the simplex that give held-out texts the largest
likelihood (linear interpolation: Jelinek & Mercer 1980). Only the probability of each target token is needed for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cotune.data.inputs.batching import sorted_batches
from cotune.data.records import Records
from cotune.data.tasks.classes import IGNORED
from cotune.data.types import Chat
from cotune.ensembles.calibration import Floats, Numbers
from cotune.ensembles.fusion import assign_folds, fit_weights
from cotune.ensembles.sequence_lessons import has_target
from cotune.ensembles.token_distillation import read_states, token_logs
from cotune.errors import DataError
from cotune.models.base.tokenizer_identity import check_same_tokenizer, tokenizer_parts
from cotune.models.config import TextMethod
from cotune.models.evaluation.intervals import TextAnswers
from cotune.models.evaluation.predictor import unit_numbers
from cotune.models.trainable import TrainableModel

FOLDS = 5
_BATCH = 16


def measure_text_fusion(
    method: TextMethod, models: Sequence[TrainableModel], names: Sequence[str], records: Records, seed: int = 0
) -> dict[str, Any]:
    """Return the loss of each model and of their fusion on the same records, as plain values.

    Weights are measured on records that they were not fitted on (five-fold cross-fitting, all records of a unit together).
    `against_best` compares the fusion with the single model of the least loss on these records, which favors that model.

    Args:
        method: The rule.
        models: Opened language models of one task.
        names: Of the models.
        records: Held out from the training of all models.
        seed: Of the folds.

    Raises:
        ModelError: The models have not the same tokenizer.
        DataError: There are too few records with a target that is read.
    """
    check_tokenizers(models, names, chats=bool(records.inputs) and isinstance(records.inputs[0], Chat))
    length = min(model.loaded.max_length for model in models)
    examples = models[0].loaded.task.examples(models[0].loaded.reader, length, records.inputs, [0] * len(records))
    rows = np.array([row for row, example in enumerate(examples) if has_target(example)], dtype=np.int64)
    logs, record = _ask(models, [examples[row] for row in rows])
    units = unit_numbers(records)[rows]
    fold = _folds(units, seed)[record]
    fused = _fuse_by_folds(method, logs, fold)
    single = [_answers(each, record, units) for each in logs]
    together = _answers(fused, record, units)
    best = max(range(len(models)), key=lambda number: single[number].score)
    against = together.compare(single[best])
    return {
        "method": method,
        "records": len(records),
        "left_out": dict(records.skipped),
        "not_predicted": len(records) - len(rows),
        "max_length": length,
        "models": [{"model": name, **_figures(answers)} for name, answers in zip(names, single, strict=True)],
        "fused": {**_figures(together), "weights": fit_text_weights(method, logs).tolist()},
        "against_best": {"model": names[best], **against.figures()},
    }


def fit_text_weights(method: TextMethod, logs: Floats) -> Floats:
    """Return the weights of models on the simplex, (models,).

    Args:
        method: average: all alike; weighted: those of the largest likelihood.
        logs: (models, n) logarithms of the probabilities that each gives target tokens.
    """
    if method == "average":
        return np.full(len(logs), 1 / len(logs))
    return fit_weights(np.exp(logs)[:, :, None], np.zeros(logs.shape[1], dtype=np.int64))


def check_tokenizers(models: Sequence[TrainableModel], names: Sequence[str], *, chats: bool) -> None:
    """Check that models read the same tokens.

    Args:
        models: Opened language models.
        names: Of the models, for the error.
        chats: Whether they read chats, and so need the same chat template, too.

    Raises:
        ModelError: The tokenizer of one is not that of the first.
    """
    first = tokenizer_parts(models[0].loaded, chats=chats)
    for model, name in zip(models[1:], names[1:], strict=True):
        check_same_tokenizer(model.loaded, first, name, names[0], chats=chats)


def smallest_table(models: Sequence[TrainableModel]) -> int:
    """Return how many tokens are in the output layer of every model."""
    return min(int(model.module.get_output_embeddings().weight.shape[0]) for model in models)  # type: ignore[operator]


def no_targets_error() -> DataError:
    """Return the error for records of which no target is read."""
    return DataError(
        "no record has a target within the length that the models read: raise --max-length, or shorten the prompts",
        code="data.no_targets",
    )


@torch.no_grad()
def _ask(models: Sequence[TrainableModel], examples: Sequence[Any]) -> tuple[Floats, Numbers]:
    """(models, n) logarithms of the probabilities of all target tokens, and the number of the record of each."""
    task = models[0].loaded.task
    size = smallest_table(models)
    collators = [task.collator(model.module, model.loaded.reader, model.device) for model in models]
    logs: list[Floats] = [np.empty((len(models), 0))]
    record: list[int] = []
    for rows in sorted_batches(range(len(examples)), lambda row: task.order(examples[row]), _BATCH):
        said = []
        for model, collate in zip(models, collators, strict=True):
            batch = collate([examples[row] for row in rows])
            labels = batch["labels"]
            said.append(token_logs(read_states(model.module, batch), labels[labels != IGNORED], size).numpy())
        logs.append(np.stack(said))
        record += [row for row in rows for label in examples[row]["labels"] if label != IGNORED]
    return np.concatenate(logs, axis=1), np.array(record, dtype=np.int64)


def _folds(units: Numbers, seed: int) -> Numbers:
    """The fold of each record. Raises DataError for fewer units than folds."""
    if not len(units):
        raise no_targets_error()
    distinct, place = np.unique(units, return_inverse=True)
    return assign_folds(np.zeros(len(distinct), dtype=np.int64), FOLDS, seed)[place]


def _fuse_by_folds(method: TextMethod, logs: Floats, fold: Numbers) -> Floats:
    """(n,) logarithms of the fused probabilities, with weights from the tokens of all other folds."""
    fused = np.empty(logs.shape[1])
    for number in range(FOLDS):
        tested = fold == number
        weights = fit_text_weights(method, logs[:, ~tested])
        with np.errstate(divide="ignore"):  # a weight of 0
            fused[tested] = np.logaddexp.reduce(logs[:, tested] + np.log(weights)[:, None], axis=0)
    return fused


def _answers(logs: Floats, record: Numbers, units: Numbers) -> TextAnswers:
    count = len(units)
    losses = np.bincount(record, weights=-logs, minlength=count).astype(np.float64)
    return TextAnswers(losses, np.bincount(record, minlength=count), np.zeros(count, dtype=np.int64), units)


def _figures(answers: TextAnswers) -> dict[str, Any]:
    """Which token a fusion finds most probable was not asked for."""
    return {key: value for key, value in answers.figures().items() if not key.startswith("accuracy")}
