"""The `[[tasks]]` tables of a plan with several tasks on one encoder, and what follows from them for other tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from cotune.data.class_names import class_name
from cotune.data.multi_task import MULTI_TASK, qualify, split_labels
from cotune.storage.config_table import ConfigTable

TAGS = "token-classification"  # the type of a task with a tag for each word
WHY_NOT = {  # types that are no part of [[tasks]]
    "multi-label": "its answer is a yes or no for each label, and heads are trained and compared by one class for each answer",
    "regression": "its target is a number, and heads are trained and compared by one class for each answer",
    "question-answering": "it reads a question beside each text, and tasks read the same input",
    "causal-lm": "it keeps the head of its base model, which is no part that tasks could have of their own",
    "seq2seq": "it keeps the head of its base model, which is no part that tasks could have of their own",
}
Balance = Literal["plan", "noise_to_signal"]


class TaskConfig(ConfigTable):
    """One of several tasks that share an encoder (the `tasks` tables of a plan); each has a head of its own."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="name of the task, and of the folder that its model is exported to"
    )
    type: Literal["sequence-classification", "token-classification", "image-classification"] = Field(
        "sequence-classification",
        description="kind of task, as `task` of a plan; all tasks read the same input: texts, with a class for the text or a tag"
        " for each of its words, or images",
    )
    label: str | None = Field(
        None,
        min_length=1,
        description="the column that holds its labels; an empty cell is no label; default: the column called like the task",
    )
    labels: tuple[str, ...] = Field((), description="its class names in the order of its head; empty: as found in the data")
    weight: float = Field(
        1.0, gt=0, le=1e3, description="λ: how much its loss counts, min over θ of Σ λ_i L(D_i, θ); before clipping"
    )

    @field_validator("type", mode="before")
    @classmethod
    def _type_can_be_shared(cls, value: Any) -> Any:
        if isinstance(value, str) and value in WHY_NOT:
            raise ValueError(
                f"a task of type {value} cannot share an encoder with others: {WHY_NOT[value]}; give it a plan of its own"
            )
        return value

    @field_validator("labels")
    @classmethod
    def _labels_as_read(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(map(class_name, value))
        if len(set(names)) < len(names) or len(names) == 1:
            raise ValueError(f"expected two or more distinct class names, got {list(names)}")
        return names


def weigh_tasks(tasks: Sequence[TaskConfig], labels: Sequence[str], balance: Balance) -> dict[str, float]:
    """Return task -> λ, the factor of its loss.

    A step of DP-SGD adds noise of the norm σC·√d to a head of d parameters, whatever its loss; for a linear head, d grows with
    the number of classes. With "noise_to_signal", λ grows with that norm, so that all heads have the same ratio of gradient to
    noise.

    Args:
        tasks: Of the plan.
        labels: Qualified class names of all tasks.
        balance: Of the plan.
    """
    sizes = {name: math.sqrt(len(classes)) for name, classes in split_labels(labels).items()}
    mean = sum(sizes.values()) / max(1, len(sizes))
    by_noise = {name: size / mean for name, size in sizes.items()} if balance == "noise_to_signal" else {}
    return {task.name: task.weight * by_noise.get(task.name, 1.0) for task in tasks}


def write_out(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add what follows from `tasks` to a plan's table: `task`, the columns in `data`, and `labels` if all tasks give theirs.

    Raises:
        ValueError: If the table contains one of these with another value.
    """
    tasks = table.get("tasks")
    data = table.get("data")
    if not tasks or not isinstance(tasks, list | tuple) or not isinstance(data, Mapping):
        return table
    read = [each if isinstance(each, TaskConfig) else TaskConfig.model_validate(each) for each in tasks]
    columns = [[each.name, each.label or each.name] for each in read]
    tags = _find_tags(read, data.get("tags") or ())
    follows: dict[str, Any] = {"task": MULTI_TASK[TAGS if tags else read[0].type]}
    if all(each.labels for each in read):
        follows["labels"] = [qualify(each.name, label) for each in read for label in each.labels]
    for key, value in follows.items():
        if table.get(key) and list(table[key]) != list(value):
            raise ValueError(f"{key} follows from [[tasks]] here: expected it left out, got {table[key]}")
    given = [list(pair) for pair in data.get("tasks") or columns]
    if any(column not in given for column in columns):  # it may have more columns, those of a plan that this one is a part of
        raise ValueError("data.tasks follows from [[tasks]]: expected it left out")
    return {**table, **follows, "data": {**data, "tasks": given, **({"tags": tags} if tags else {})}}


def _find_tags(tasks: Sequence[TaskConfig], given: Sequence[str]) -> list[str]:
    """Return the tasks with a tag for each word; a part of a plan has those of the whole, as its records are read as before.

    Raises:
        ValueError: If `data.tags` names other ones among these tasks.
    """
    found = [each.name for each in tasks if each.type == TAGS]
    if given and found != [each.name for each in tasks if each.name in given]:
        raise ValueError("data.tags follows from [[tasks]]: expected it left out")
    return list(given) or found


def find_problems(tasks: Sequence[TaskConfig], modes: Sequence[str], held: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield, in words, why tasks cannot share an encoder.

    Args:
        tasks: Of the plan.
        modes: What its stages train.
        held: In a simulation, the tasks of each organization.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        yield f"tasks: expected distinct names, got {names}"
    types = {task.type for task in tasks}
    if len(types) > 1 and "image-classification" in types:
        named = " and ".join(sorted(types))
        yield f"tasks: all share one encoder and read the same input, and their types are {named}: expected texts, or images"
    if tasks and all(mode == "head" for mode in modes):
        yield (
            "train = head leaves the encoder unchanged, so that tasks would share nothing: expected train = lora, blocks or"
            " full, or a plan for each task"
        )
    unknown = sorted({name for each in held for name in each} - set(names))
    if unknown or any(not each for each in held):
        yield f"simulation.tasks: expected for each organization some of {names}, got {[list(each) for each in held]}"
