"""Load a finished model with its trained head, and find out from its folder what it is for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig

from cotune.data.config import TaskName, has_labels
from cotune.data.inputs.declared_counts import check_declared_counts
from cotune.data.tasks.task import get_task
from cotune.errors import ModelError, reason_of
from cotune.models.base.folder import ENCODER, read_base_labels, read_settings
from cotune.models.base.load import LoadedModel, load_layer_model, load_model
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.features.layer_folder import is_layer_model

_LENGTH = 512  # tokens, where a folder does not say how long texts were in training
_LONGEST = 32768
_TASKS: tuple[TaskName, ...] = (
    "sequence-classification",
    "token-classification",
    "image-classification",
    "question-answering",
)
_BY_PROBLEM: dict[str, TaskName] = {"regression": "regression", "multi_label_classification": "multi-label"}  # with texts


def load_single(source: str, max_length: int | None = None) -> tuple[LoadedModel, tuple[str, ...], TaskName]:
    """Return a finished model that is not fused, with its labels and task. Raises ModelError."""
    with speaking_of_models():
        folder = find_base(ModelConfig(base=source))
        path = folder.path
        task = _task_of(path)
        labels = _labels_of(path) if has_labels(task) else read_base_labels(path)
        if is_layer_model(path):
            return load_layer_model(folder, task, max_length or length_of(path / ENCODER)), labels, task
        config = ModelConfig(base=source, pooling="native", max_length=max_length or length_of(path))
        return load_model(config, labels, 0, task, finished=True), labels if has_labels(task) else (), task


@contextmanager
def speaking_of_models() -> Iterator[None]:
    """Let the sentences of errors within the block be about a finished model, where they are about base models else."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("the base model", "the model"), code=error.code) from None


def _task_of(path: Path) -> TaskName:
    """By the architecture that the configuration names, which says what kind of head the weights are for."""
    settings = read_settings(path)
    architectures = settings.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    for task in _TASKS:
        kind = get_task(task).model_class().__name__.removeprefix("AutoModel")
        if any(name.endswith(kind) for name in named):
            return _refine(task, settings.get("problem_type"))
    raise ModelError(
        f"the model's config.json names the architecture {', '.join(named)[:80] or 'of nothing'}: expected one for sequence,"
        " token or image classification, or for questions, such as `model/` in the folder of a run",
        code="model.no_classifier",
    )


def _refine(task: TaskName, problem_type: object) -> TaskName:
    """Heads of one architecture are for several tasks."""
    if problem_type in (None, "single_label_classification"):
        return task
    if task == "sequence-classification" and isinstance(problem_type, str) and problem_type in _BY_PROBLEM:
        return _BY_PROBLEM[problem_type]
    raise ModelError(
        f"the model's config.json says problem_type = {json.dumps(problem_type)[:40]}: expected a model that predicts one class"
        " of several (single_label_classification), or of texts a number or several labels",
        code="model.no_classifier",
    )


def _labels_of(path: Path) -> tuple[str, ...]:
    """In the order of the head. Raises ModelError for fewer than two."""
    names = read_base_labels(path)
    if not names:
        names = _generic_labels(path)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ModelError(
            f"the model's config.json names the classes {', '.join(names)[:80]}: expected two or more, all different",
            code="model.damaged_config",
        )
    return names


def _generic_labels(path: Path) -> tuple[str, ...]:
    """Those that a configuration has which names none, or LABEL_0, LABEL_1, …"""
    check_declared_counts(read_settings(path))
    try:
        known = AutoConfig.from_pretrained(str(path), trust_remote_code=False).id2label
    except Exception as error:  # a configuration that is not as its architecture expects raises anything
        raise ModelError(
            f"{path / 'config.json'} cannot be read as that of a model ({reason_of(error)[:120]}): expected one as"
            " save_pretrained() writes it",
            code="model.damaged_config",
        ) from None
    return tuple(str(known[number]) for number in sorted(known))


def length_of(path: Path) -> int:
    """Return the length that a tokenizer's settings say; those of most pretrained models say a number that means nothing."""
    try:
        said = json.loads((path / "tokenizer_config.json").read_bytes())["model_max_length"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _LENGTH
    return said if isinstance(said, int) and 2 <= said <= _LONGEST else _LENGTH
