"""A finished language model, opened to write and to be judged. Nothing of its folder runs code.

Only configuration, tokenizer and safetensors are read; custom code is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from cotune.data.config import TaskName
from cotune.data.dataset import Dataset
from cotune.data.inputs.chat_template import check_chat_template
from cotune.data.records import Records
from cotune.errors import ModelError
from cotune.models.base.finished import length_of
from cotune.models.base.folder import is_fused, read_settings
from cotune.models.base.fused_folder import nested_fusion_error, read_fusion_document
from cotune.models.base.load import load_model
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.device import pick_device
from cotune.models.evaluation.intervals import TextAnswers
from cotune.models.evaluation.predictor import folder_of, unit_numbers
from cotune.models.evaluation.test_set import predict
from cotune.models.trainable import TrainableModel

_ARCHITECTURES: dict[TaskName, frozenset[str]] = {
    "causal-lm": frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()),
    "seq2seq": frozenset(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()),
}


def writing_task(source: str) -> TaskName | None:
    """Return the task of a model whose configuration names the architecture of a language model, or of several that are fused.

    None for any other model, or none.

    Args:
        source: Its folder, the folder of a run with `model/` in it, or a Hugging Face hub id.
    """
    folder = Path(folder_of(source)).expanduser()
    if is_fused(folder):
        task = read_fusion_document(folder).task
        return task if task in _ARCHITECTURES else None
    try:
        named = read_settings(find_base(ModelConfig(base=folder_of(source))).path).get("architectures")
    except ModelError:
        return None
    known = {str(name) for name in named} if isinstance(named, list) else set[str]()
    return next((task for task, names in _ARCHITECTURES.items() if known & names), None)


def open_language_model(
    source: str,
    task: TaskName = "causal-lm",
    device: str = "auto",
    max_length: int | None = None,
    *,
    chats: bool = False,
    system: str | None = None,
) -> TrainableModel:
    """Open a model.

    Args:
        source: As of `writing_task`.
        task: What that says.
        device: auto, cpu, cuda or cuda:N.
        max_length: Tokens to read of a prompt with its target; None: as many as in training, as far as the folder says so.
        chats: Whether it is to read chats, for which its tokenizer needs a chat template.
        system: The system message that these begin with; None: no common one.

    Raises:
        ModelError: When it cannot be used.
        DeviceError: When the device is not here.
    """
    to = pick_device(device)
    base = folder_of(source)
    if is_fused(Path(base).expanduser()):
        raise nested_fusion_error(source)
    try:
        config = ModelConfig(base=base, max_length=max_length or length_of(find_base(ModelConfig(base=base)).path))
        loaded = load_model(config, (), 0, task, finished=True)
        if chats:
            check_chat_template(loaded.reader, system)
        return TrainableModel(loaded, None, 0, to)
    except ModelError as error:
        raise ModelError(str(error).replace("the base model", "the model"), code=error.code) from None


def evaluate_language_model(model: TrainableModel, records: Records, task: TaskName = "causal-lm") -> dict[str, Any]:
    """Return loss, perplexity and token accuracy on records, with their intervals, as plain values.

    Args:
        model: In the state that is judged.
        records: Read as those of the task.
        task: Of the model.

    Raises:
        DataError: Where no record has a target that the model reads.
    """
    held = Dataset(((records, np.arange(len(records))),), (), task)
    losses, tokens, right = (np.asarray(column) for column in zip(*predict(model, {}, held, "auto"), strict=True))
    answers = TextAnswers(losses, tokens, right, unit_numbers(records))
    return {
        "task": task,
        "labels": [],
        "max_length": model.loaded.max_length,
        "records": len(records),
        "left_out": dict(records.skipped),
        "not_predicted": int((tokens == 0).sum()),
        "figures": answers.figures(),
    }
