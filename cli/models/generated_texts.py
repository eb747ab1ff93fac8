"""Generate texts after prompts, and compute the loss on given ones, for `cotune predict` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.cli.plans.plan_options import own_options
from cotune.data.config import TASK_FACTS, DataConfig, TaskName
from cotune.data.inputs.chat_wording import ChatWording
from cotune.data.record_reading import read_records
from cotune.data.types import Chat, Passage
from cotune.data.unlabeled import read_typed, read_unlabeled
from cotune.ensembles.fused_language_model import FusedLanguageModel, open_fused_language_model
from cotune.errors import DataError, ModelError
from cotune.models.base.folder import is_fused
from cotune.models.evaluation.language_model import evaluate_language_model, open_language_model, writing_task
from cotune.models.evaluation.predictor import folder_of
from cotune.models.generation import write_texts
from cotune.models.trainable import TrainableModel

_UNREAD = "longer than the model reads, or unreadable for it"


def find_writer(model: str, threshold: str | None) -> TaskName | None:
    """Return the task of a language model; None for another model. Raises ModelError for a threshold, which is for classes."""
    task = writing_task(model)
    if task is not None and threshold is not None:
        raise ModelError(f"{model} writes texts, and --threshold is for classes: leave it out", code="model.no_classifier")
    return task


def write_rows(
    model: str,
    task: TaskName,
    inputs: Path | Sequence[str],
    *,
    column: str | None,
    chats: bool,
    encoding: str,
    max_new_tokens: int,
    separator: str,
    wording: ChatWording,
    max_length: int | None,
    device: str,
) -> list[dict[str, Any]]:
    """Return one plain table for each prompt, in order, with what a language model writes after it.

    Args:
        model: A folder of a model or a run, or a hub id.
        task: Of the model.
        inputs: A file, or the prompts themselves.
        column: That holds the prompts in a file; None: "text".
        chats: Whether the prompts are chats, or what a user says in one.
        encoding: Of a file of text.
        max_new_tokens: Most tokens of a text.
        separator: Text after a prompt that is not a chat.
        wording: System message and instruction of the chats, for a chat model.
        max_length: Longest prompt, in tokens; None: as in training.
        device: Such as "cpu" or "cuda:0".
    """
    becomes_chats = chats or wording != ChatWording()
    check_chats(task, becomes_chats)
    opened = _open(model, task, device, max_length, chats=becomes_chats, system=wording.system)
    with own_options():
        if isinstance(inputs, Path):
            rows = read_unlabeled(inputs, task, column=column, encoding=encoding, chats=chats)
        else:
            rows = read_typed(list(inputs), task, chats=chats)
    given = [row.given for row in rows if isinstance(row.given, Passage | Chat)]
    prompts = [complete_prompt(each, separator, wording) for each in given]
    if isinstance(opened, FusedLanguageModel):
        texts = iter(opened.write(prompts, max_new_tokens))
    else:
        texts = iter(write_texts(opened, prompts, max_new_tokens, "auto"))
    generated = [None if row.given is None else next(texts) for row in rows]
    return [
        {"row": number, "input": row.shown, "text": text, "reason": row.reason or ("" if text is not None else _UNREAD)}
        for number, (row, text) in enumerate(zip(rows, generated, strict=True), 1)
    ]


def complete_prompt(given: Passage | Chat, separator: str, wording: ChatWording) -> Passage | Chat:
    """Return a prompt with all that a model has read beside it in training.

    Args:
        given: The prompt alone, or a chat.
        separator: Text after a prompt that is not made a chat.
        wording: System message and instruction; with neither, a prompt is not made a chat.
    """
    if isinstance(given, Chat):
        return wording.begin(given)
    return Passage(given.prompt + separator, "") if wording == ChatWording() else wording.ask(given.prompt)


def evaluate_texts(model: str, task: TaskName, data: DataConfig, *, max_length: int | None, device: str) -> dict[str, Any]:
    """Return how good a language model is on records.

    Args:
        model: A folder of a model or a run, or a hub id.
        task: Of the model.
        data: The records and how they are read.
        max_length: Tokens that are read of a record; None: as in training.
        device: What computes.
    """
    check_records(model, task, data)
    opened = _open(model, task, device, max_length, chats=data.chats, system=data.system)
    with own_options():
        records = read_records(data, None, task)
    if isinstance(opened, FusedLanguageModel):
        return opened.evaluate(records)
    return evaluate_language_model(opened, records, task)


def _open(
    model: str, task: TaskName, device: str, max_length: int | None, *, chats: bool, system: str | None
) -> TrainableModel | FusedLanguageModel:
    if is_fused(Path(folder_of(model)).expanduser()):
        return open_fused_language_model(model, device, max_length, chats=chats, system=system)
    return open_language_model(model, task, device, max_length, chats=chats, system=system)


def check_records(model: str, task: TaskName, data: DataConfig) -> None:
    """Check that records are described as a language model reads them.

    Args:
        model: For the error.
        task: Of the model.
        data: How the records are read.

    Raises:
        ModelError: If chats are not for it.
        DataError: If it needs prompts, and there are none.
    """
    check_chats(task, data.chats)
    if TASK_FACTS[task].prompts == "must" and data.prompt is None:
        raise DataError(
            f"{model} reads a text and writes another one: expected --prompt and --target, the columns of both",
            code="data.invalid_description",
        )


def check_chats(task: TaskName, chats: bool) -> None:
    """Raises ModelError for a model that reads none."""
    if chats and not TASK_FACTS[task].chats:
        raise ModelError(
            f"chats are for models that go on with a text (causal-lm), and this one is for {task}: expected texts, or prompts"
            " with targets",
            code="model.no_chat_template",
        )
