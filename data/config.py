"""The table of a plan that says which records are used, and what for. No module that this one imports loads PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TaskName = Literal[
    "sequence-classification",
    "token-classification",
    "image-classification",
    "multi-label",
    "regression",
    "causal-lm",
    "seq2seq",
    "question-answering",
    "multi-task",
    "multi-task-images",
    "multi-task-tags",
]


@dataclass(frozen=True)
class TaskFacts:
    """What a plan must know of a task, without its code.

    Attributes:
        labels: Whether records have labels, of which a plan lists the names (`labels`).
        classes: Whether each answer is one class out of `labels`.
        keeps_head: Whether a model has the head of its base model, so that none can be trained by itself.
        several: Whether it is several tasks on one encoder ([[tasks]]).
        prompts: Whether its records may, or must, have a prompt and a target.
        chats: Whether its records may be chats (`data.messages`).
        ranged: Whether its targets are numbers of a public range.
        features: Whether the task supports a head on layers of a frozen encoder (`model.feature`).
    """

    labels: bool = True
    classes: bool = True
    keeps_head: bool = False
    several: bool = False
    prompts: Literal["none", "may", "must"] = "none"
    chats: bool = False
    ranged: bool = False
    features: bool = False


TASK_FACTS: Mapping[str, TaskFacts] = {
    "sequence-classification": TaskFacts(features=True),
    "token-classification": TaskFacts(),
    "image-classification": TaskFacts(),
    "multi-label": TaskFacts(classes=False),
    "regression": TaskFacts(labels=False, classes=False, ranged=True),
    "causal-lm": TaskFacts(labels=False, classes=False, keeps_head=True, prompts="may", chats=True),
    "seq2seq": TaskFacts(labels=False, classes=False, keeps_head=True, prompts="must"),
    "question-answering": TaskFacts(labels=False, classes=False),
    "multi-task": TaskFacts(several=True),
    "multi-task-images": TaskFacts(several=True),
    "multi-task-tags": TaskFacts(several=True),
}


def has_labels(task: str) -> bool:
    """Whether a task's records have labels, of which a plan lists the names (`labels`)."""
    return TASK_FACTS[task].labels


def has_classes(task: str) -> bool:
    """Whether each answer of a task is one class out of `labels`."""
    return TASK_FACTS[task].classes


_TEXT = "text"
_SEPARATOR = "\n"


class DataConfig(BaseModel):
    """Where an organization's records are, and which of their columns are used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        min_length=1,
        description="a file, a folder with one file per organization, or package:NAME for data in a Python package",
    )
    text: str = Field(default=_TEXT, min_length=1, description="the column that holds the text, or the words of one")
    image: str = Field(default="image", min_length=1, description="the column that holds an image: its path, or (Parquet) bytes")
    label: str = Field(
        default="label",
        min_length=1,
        description="the column that holds the label, the tag of each word, the labels of a record (multi-label), or a number"
        " (regression)",
    )
    label_separator: str = Field(
        default=",",
        min_length=1,
        max_length=10,
        description="multi-label: the separator between the labels of a record where they are one text, as in CSV; lists "
        "in JSON and Parquet need none",
    )
    prompt: str | None = Field(
        default=None,
        min_length=1,
        description="causal-lm, seq2seq: the column that holds what a model is given; default, for causal-lm alone: nothing, and"
        " it learns to write `text`",
    )
    target: str | None = Field(
        default=None,
        min_length=1,
        description="causal-lm, seq2seq: the column that holds the text that the model is trained to write",
    )
    messages: str | None = Field(
        default=None,
        min_length=1,
        description="causal-lm: the column that holds a chat, a list of {role, content} (in CSV as JSON), which the tokenizer's"
        " chat template writes out; the last message of the role assistant is the target, and what stands before it the prompt",
    )
    instruction: str | None = Field(
        default=None,
        min_length=1,
        max_length=2000,
        description="causal-lm: what is to be done with a prompt, such as 'Write a short title:'; prompt and target are then a"
        " chat, in which a user says the instruction, an empty line and the prompt; for models that are made for chats",
    )
    system: str | None = Field(
        default=None,
        max_length=2000,
        description="causal-lm: the first message of each chat, of the role system, unless a chat of `messages` begins with one"
        " of its own; an empty one keeps templates such as SmolLM2's from adding theirs; prompt and target are then a chat, too",
    )
    separator: str = Field(
        default=_SEPARATOR, max_length=100, description="causal-lm, seq2seq: the text between a prompt and its target"
    )
    context: str = Field(
        default="context", min_length=1, description="question-answering: the column that holds the text with the answer"
    )
    question: str = Field(default="question", min_length=1, description="question-answering: the column that holds the question")
    answers: str = Field(
        default="answers",
        min_length=1,
        description="question-answering: the column that holds the answers, parts of the context: one text, several, or as SQuAD"
        " has them (text and answer_start)",
    )
    tasks: tuple[tuple[str, str], ...] = Field(
        default=(),
        description="of several tasks: each with the column of its labels, such as [['topic', 'section']]; written out from"
        " [[tasks]]",
    )
    tags: tuple[str, ...] = Field(
        default=(),
        description="of several tasks: those whose column holds a tag for each word; written out from [[tasks]]",
    )
    unit: str | None = Field(
        default=None,
        min_length=1,
        description="the column that names the unit of privacy that a record belongs to, such as a patient; default: the "
        "column called privacy.unit",
    )
    encoding: str = Field(
        default="utf-8", description="text encoding of a CSV, TSV or JSON file, such as utf-8, latin-1 or utf-16"
    )
    deduplicate: bool = Field(
        default=False,
        description="keep only the first of several records with the same input, or none of them if their labels differ",
    )

    @property
    def chats(self) -> bool:
        """Whether records are chats, which the base model's chat template writes out."""
        return any(given is not None for given in (self.messages, self.instruction, self.system))

    def without_units(self) -> DataConfig:
        """For records of which nobody need say whose they are, such as a coordinator's test set."""
        return self.model_copy(update={"unit": None})

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "a".encode(value)
        except (LookupError, ValueError) as error:
            raise ValueError(f"{value!r} is not a text encoding: expected one such as utf-8 or latin-1") from error
        return value

    @model_validator(mode="after")
    def _prompts_have_targets(self) -> DataConfig:
        if (self.prompt is None) != (self.target is None):
            lacking = "target" if self.target is None else "prompt"
            raise ValueError(f"{lacking} is not given: expected the columns of both, prompt and target, or of text alone")
        return self

    @model_validator(mode="after")
    def _chats_hold_all(self) -> DataConfig:
        if self.messages is None:
            return self
        if self.prompt is not None or self.text != _TEXT:
            other = "prompt and target" if self.prompt is not None else "text"
            raise ValueError(f"messages and {other} are both given: expected one of them, as a chat holds prompt and target")
        if self.messages == self.unit:
            raise ValueError(f"messages and unit are both {self.unit!r}: expected two different columns")
        return self

    @model_validator(mode="after")
    def _wording_is_for_chats(self) -> DataConfig:
        if self.instruction is not None and self.messages is not None:
            raise ValueError("messages and instruction are both given: expected one of them, as messages hold complete chats")
        if self.instruction is not None and self.prompt is None:
            raise ValueError("instruction says what is to be done with a prompt: expected prompt and target, too")
        if self.system is not None and self.messages is None and self.prompt is None:
            raise ValueError("system is what a chat begins with: expected messages, or prompt and target, too")
        if self.chats and self.separator != _SEPARATOR:
            raise ValueError("separator is what stands behind a prompt, which in a chat its template says: leave it out")
        return self

    @model_validator(mode="after")
    def _different_columns(self) -> DataConfig:
        questions = (("context", "question"), ("context", "answers"), ("question", "answers"))
        pairs = (("text", "label"), ("image", "label"), ("unit", "label"), ("unit", "text"), ("unit", "image"))
        for key, other in (*pairs, ("prompt", "target"), ("unit", "prompt"), ("unit", "target"), *questions):
            if getattr(self, key) is not None and getattr(self, key) == getattr(self, other):
                raise ValueError(f"{key} and {other} are both {getattr(self, key)!r}: expected two different columns")
        inputs = (self.text, self.image, self.unit)
        taken = next((column for _, column in self.tasks if column in inputs), None)
        if taken is not None:
            raise ValueError(f"the column {taken!r} holds the labels of a task and something else: expected a column of its own")
        return self
