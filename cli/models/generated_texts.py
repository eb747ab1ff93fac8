"""What `cotune predict` and `evaluate` compute with a language model: texts after prompts, and the loss on true ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.cli.plans.plan_options import own_options
from cotune.data.config import DataConfig
from cotune.data.record_files import read_records
from cotune.data.types import Passage
from cotune.data.unlabeled import read_typed, read_unlabeled
from cotune.errors import ModelError
from cotune.models.evaluation.language_model import TASK, evaluate_language_model, is_language_model, open_language_model
from cotune.models.generation import write_texts

_TOO_LONG = "longer than the model reads"


def writes_texts(model: str, threshold: str | None) -> bool:
    """Return whether a model is a language model. Raises ModelError for one with a threshold, which is for classes."""
    if not is_language_model(model):
        return False
    if threshold is not None:
        raise ModelError(f"{model} writes texts, and --threshold is for classes: leave it out", code="model.no_classifier")
    return True


def write_rows(
    model: str,
    inputs: Path | Sequence[str],
    *,
    column: str | None,
    encoding: str,
    max_new_tokens: int,
    separator: str,
    max_length: int | None,
    device: str,
) -> list[dict[str, Any]]:
    """Return one plain table for each prompt, in order, with what a language model writes after it.

    Args:
        model: A folder of a model or a run, or a hub id.
        inputs: A file, or the prompts themselves.
        column: That holds the prompts in a file; None: "text".
        encoding: Of a file of text.
        max_new_tokens: Most tokens of a text.
        separator: What stands behind a prompt.
        max_length: Tokens that are read of a prompt; None: as in training.
        device: What computes.
    """
    opened = open_language_model(model, device, max_length)
    with own_options():
        if isinstance(inputs, Path):
            rows = read_unlabeled(inputs, TASK, column=column, encoding=encoding)
        else:
            rows = read_typed(list(inputs), TASK)
    prompts = [row.given.prompt + separator for row in rows if isinstance(row.given, Passage)]
    texts = iter(write_texts(opened, prompts, max_new_tokens, "auto"))
    generated = [None if row.given is None else next(texts) for row in rows]
    return [
        {"row": number, "input": row.shown, "text": text, "reason": row.reason or ("" if text is not None else _TOO_LONG)}
        for number, (row, text) in enumerate(zip(rows, generated, strict=True), 1)
    ]


def evaluate_texts(model: str, data: DataConfig, *, max_length: int | None, device: str) -> dict[str, Any]:
    """Return how good a language model is on records.

    Args:
        model: A folder of a model or a run, or a hub id.
        data: The records and how they are read.
        max_length: Tokens that are read of a record; None: as in training.
        device: What computes.
    """
    opened = open_language_model(model, device, max_length)
    with own_options():
        records = read_records(data, None, TASK)
    return evaluate_language_model(opened, records)
