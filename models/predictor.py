"""A finished model, opened to be used: its folder holds the head too, and nothing of it is executed.

Only configuration, tokenizer (or image processor) and safetensors are read; custom code is never run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig

from cotune.models.base import LoadedModel, find_base, load_model
from cotune.models.batching import tight_batches
from cotune.models.config import ModelConfig, TaskName
from cotune.models.device import pick_device
from cotune.models.errors import ModelError, reason_of
from cotune.models.inputs import Input
from cotune.models.model_settings import base_labels, read_settings
from cotune.models.sharing import SharedModel
from cotune.models.tasks import logits, task_named
from cotune.models.text_task import Example

_BATCH = 64
_LENGTH = 512  # tokens, where a folder does not say how long texts were in training
_LONGEST = 32768
_TASKS: tuple[TaskName, ...] = ("sequence-classification", "token-classification", "image-classification")


@dataclass(frozen=True)
class Predictor:
    """A finished model.

    Attributes:
        model: In the state of its folder.
        labels: Class names in the order of the head.
        task: What it is for.
    """

    model: SharedModel
    labels: tuple[str, ...]
    task: TaskName

    @property
    def max_length(self) -> int:
        """Tokens that it reads of a text."""
        return self.model.loaded.max_length

    @torch.no_grad()
    def probabilities(self, inputs: Sequence[Input]) -> list[Tensor]:
        """Return for each input (answers, classes) in float64: one row, or one for each word; NaN for what was not read."""
        loaded = self.model.loaded
        made_up = [(0,) * len(given) if isinstance(given, tuple) else 0 for given in inputs]
        examples = loaded.task.examples(loaded.reader, loaded.max_length, inputs, made_up)
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        for rows in tight_batches(range(len(examples)), lambda row: loaded.task.order(examples[row]), _BATCH):
            for row, scores in zip(rows, self._scores([examples[row] for row in rows]), strict=True):
                found[row] = functional.softmax(scores.double(), dim=-1).cpu()
        return found

    def _scores(self, examples: Sequence[Example]) -> list[Tensor]:
        loaded = self.model.loaded
        collate = loaded.task.collator(self.model.module, loaded.reader, self.model.device)
        return loaded.task.answer_scores(logits(self.model.module, collate(examples)), examples)


def open_predictor(source: str, device: str = "auto", max_length: int | None = None) -> Predictor:
    """Open a model.

    Args:
        source: Its folder, the folder of a run with `model/` in it, or a Hugging Face hub id.
        device: auto, cpu, cuda or cuda:N.
        max_length: Tokens to read of a text; None: as many as in training, as far as the folder says so.

    Raises:
        ModelError: When it cannot be used, or has no trained head.
        DeviceError: When the device is not here.
    """
    to = pick_device(device)
    loaded, labels, task = load_finished(_folder_of(source), max_length)
    return Predictor(SharedModel(loaded, None, 0, to), labels, task)


def load_finished(source: str, max_length: int | None = None) -> tuple[LoadedModel, tuple[str, ...], TaskName]:
    """Return a finished model with its labels and task. Raises ModelError."""
    try:
        path = find_base(ModelConfig(base=source)).path
        task, labels = _task_of(path), _labels_of(path)
        config = ModelConfig(base=source, pooling="native", max_length=max_length or _length_of(path))
        return load_model(config, labels, 0, task, finished=True), labels, task
    except ModelError as error:
        raise ModelError(str(error).replace("the base model", "the model")) from None


def _folder_of(source: str) -> str:
    """The model in the folder of a run, or the folder itself."""
    folder = Path(source).expanduser()
    inner = folder / "model"
    return str(inner) if not (folder / "config.json").exists() and (inner / "config.json").exists() else source


def _task_of(path: Path) -> TaskName:
    """By the architecture that the configuration names, which says what kind of head the weights are for."""
    settings = read_settings(path)
    architectures = settings.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    for task in _TASKS:
        kind = task_named(task).model_class().__name__.removeprefix("AutoModel")
        if any(name.endswith(kind) for name in named):
            _check_one_class(settings.get("problem_type"))
            return task
    raise ModelError(
        f"the model's config.json names the architecture {', '.join(named)[:80] or 'of nothing'}: expected one for sequence,"
        " token or image classification, such as `model/` in the folder of a run"
    )


def _check_one_class(problem_type: object) -> None:
    if problem_type not in (None, "single_label_classification"):
        raise ModelError(
            f"the model's config.json says problem_type = {json.dumps(problem_type)[:40]}: expected a model that tells one class"
            " of several (single_label_classification)"
        )


def _labels_of(path: Path) -> tuple[str, ...]:
    """In the order of the head. Raises ModelError for fewer than two."""
    names = base_labels(path)
    if not names:
        names = _generic_labels(path)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ModelError(
            f"the model's config.json names the classes {', '.join(names)[:80]}: expected two or more, all different"
        )
    return names


def _generic_labels(path: Path) -> tuple[str, ...]:
    """Those that a configuration has which names none, or LABEL_0, LABEL_1, …"""
    try:
        known = AutoConfig.from_pretrained(str(path), trust_remote_code=False).id2label
    except Exception as error:  # a configuration that is not as its architecture expects raises anything
        raise ModelError(
            f"{path / 'config.json'} cannot be read as that of a model ({reason_of(error)[:120]}): expected one as"
            " save_pretrained() writes it"
        ) from None
    return tuple(str(known[number]) for number in sorted(known))


def _length_of(path: Path) -> int:
    """What the tokenizer's settings say; those of most pretrained models say a number that means that nobody knows."""
    try:
        said = json.loads((path / "tokenizer_config.json").read_bytes())["model_max_length"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _LENGTH
    return said if isinstance(said, int) and 2 <= said <= _LONGEST else _LENGTH
