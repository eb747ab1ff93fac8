"""Measure language models together, for `cotune fuse`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from cotune.cli.models.generated_texts import check_records
from cotune.cli.plans.plan_options import own_options
from cotune.data.config import DataConfig, TaskName
from cotune.data.record_reading import read_records
from cotune.ensembles.text_fusion import TextMethod, measure_text_fusion
from cotune.models.config import Method
from cotune.models.evaluation.language_model import open_language_model


def fuse_texts(
    models: Sequence[str],
    task: TaskName,
    data: DataConfig,
    method: Method,
    *,
    seed: int,
    max_length: int | None,
    device: str,
) -> dict[str, Any]:
    """Return the loss of each model and of all together.

    Args:
        models: Folders of models or runs, or hub ids.
        task: Of the models.
        data: Records with targets that no model was trained on, and how they are read.
        method: `average` or `weighted`.
        seed: Of the folds.
        max_length: Tokens that are read of a record; None: as in training.
        device: What computes.
    """
    check_records(models[0], task, data)
    opened = [open_language_model(model, task, device, max_length, chats=data.chats, system=data.system) for model in models]
    with own_options():
        records = read_records(data, None, task)
    return {"task": task, **measure_text_fusion(cast(TextMethod, method), opened, models, records, seed)}
