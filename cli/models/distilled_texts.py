"""Distill language models, for `cotune distill`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.cli.models.generated_texts import check_chats, complete_prompt
from cotune.cli.options import RecordOptions
from cotune.cli.plans.plan_options import own_options
from cotune.data.config import TASK_FACTS, TaskName
from cotune.data.inputs.chat_wording import ChatWording
from cotune.data.record_reading import read_records
from cotune.data.types import Chat, Passage
from cotune.data.unlabeled import read_unlabeled
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.sequence_distillation import SequenceDistillation, distill_sequences
from cotune.ensembles.written_targets import Text
from cotune.errors import DataError, ModelError
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.evaluation.language_model import open_language_model, writing_task
from cotune.models.evaluation.predictor import folder_of
from cotune.reporting.distilled_card import distilled_card, promises_privacy, read_privacy
from cotune.reporting.model_card import CARD


def find_task(teachers: Sequence[str]) -> TaskName | None:
    """Return the task of teachers that write texts; None for others. Raises ModelError where some do, and others do not."""
    tasks = [writing_task(teacher) for teacher in teachers]
    for teacher, task in zip(teachers, tasks, strict=True):
        if task != tasks[0]:
            find_base(ModelConfig(base=folder_of(teacher)))  # that there is none is another error
            raise ModelError(
                f"{teacher} is {_kind(task)}, and {teachers[0]} is {_kind(tasks[0])}: expected teachers of one task",
                code="model.other_task",
            )
    return tasks[0]


def _kind(task: TaskName | None) -> str:
    return "no language model" if task is None else f"one for {task}"


def distill_texts(
    teachers: Sequence[str],
    task: TaskName,
    student: ModelConfig,
    config: DistillationConfig,
    data: Path,
    columns: RecordOptions,
    *,
    write: int | None,
    weights: Sequence[float] = (),
    out: Path,
    device: str,
    license: str,
    source: str,
) -> dict[str, Any]:
    """Train a student on what teachers say of texts, or write themselves; write it, and return its settings and figures.

    Args:
        teachers: Folders of models or runs, or hub ids.
        task: Of the teachers.
        student: The base model that learns.
        config: How it is trained.
        data: Public prompts, with targets or without.
        columns: How they are read.
        write: Most tokens of a target that the teachers write; None: the file has targets.
        weights: Of the teachers, together 1; empty: all alike.
        out: A new folder for the student.
        device: What computes.
        license: Of the inputs.
        source: Where they come from.

    Returns:
        Settings and figures, and under `unprotected` the teachers whose model cards promise no privacy.
    """
    check_chats(task, columns.chats)
    _check_columns(task, columns, write)
    with own_options():
        inputs, left_out = _read_targets(data, columns, task) if write is None else _read_prompts(data, columns, task)
    told: dict[str, Any] = {"chats": columns.chats, "system": columns.system}
    opened = [open_language_model(teacher, task, device, student.max_length, **told) for teacher in teachers]
    privacy = [read_privacy(teacher.loaded.folder.path) for teacher in opened]
    work = SequenceDistillation(
        opened, teachers, task, student, config, inputs, out, write, device, license, source, left_out, weights
    )
    found = distill_sequences(work, lambda found: {CARD: distilled_card(out.name, found, privacy)})
    unprotected = [name for name, said in zip(teachers, privacy, strict=True) if not promises_privacy(said)]
    return {**found, "unprotected": unprotected}


def _check_columns(task: TaskName, columns: RecordOptions, write: int | None) -> None:
    """Raises DataError for columns that do not say what is read."""
    given = columns.prompt is not None or columns.messages is not None
    if write is not None and columns.target is not None:
        raise DataError(
            "--write-targets lets the teachers write what the student learns, and --target names the column that holds it:"
            " expected one of them",
            code="data.invalid_description",
        )
    if columns.instruction is not None and (columns.prompt is None or columns.separator is not None):
        raise DataError(
            "--instruction says what is to be done with a prompt, in a chat: expected it with --prompt, and without --separator",
            code="data.invalid_description",
        )
    if columns.system is not None and (not given or columns.separator is not None):
        raise DataError(
            "--system is what a chat begins with: expected it with --prompt or --messages, and without --separator",
            code="data.invalid_description",
        )
    if given and columns.text is not None:
        raise DataError(
            "--text is the column of texts that are learned as they are, and --prompt or --messages says that there are prompts:"
            " expected one of them",
            code="data.invalid_description",
        )
    if not given and (write is not None or TASK_FACTS[task].prompts == "must"):
        raise DataError(
            "the public file needs prompts: expected --prompt, the column that holds them"
            + (", with --target" if write is None else ", or --messages for chats" if TASK_FACTS[task].chats else ""),
            code="data.invalid_description",
        )


def _read_targets(data: Path, columns: RecordOptions, task: TaskName) -> tuple[list[Text], dict[str, int]]:
    records = read_records(columns.config(str(data)), None, task)
    return [given for given in records.inputs if isinstance(given, Passage | Chat)], dict(records.skipped)


def _read_prompts(data: Path, columns: RecordOptions, task: TaskName) -> tuple[list[Text], dict[str, int]]:
    """Prompts without targets, with all that stands beside them in training."""
    chats = columns.messages is not None
    column = columns.messages if chats else columns.prompt
    rows = read_unlabeled(data, task, column=column, encoding=columns.encoding, chats=chats)
    wording = ChatWording(columns.system, columns.instruction)
    separator = "\n" if columns.separator is None else columns.separator
    found: list[Text] = []
    left_out: dict[str, int] = {}
    for row in rows:
        if isinstance(row.given, Passage | Chat):
            found.append(complete_prompt(row.given, separator, wording))
        else:
            left_out[row.reason] = left_out.get(row.reason, 0) + 1
    return found, left_out
