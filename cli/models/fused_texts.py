"""Measure language models together, for `cotune fuse`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.cli.models.generated_texts import check_records
from cotune.cli.plans.plan_options import own_options
from cotune.data.config import DataConfig, TaskName
from cotune.data.record_reading import read_records
from cotune.ensembles.fused_language_model import write_fused_language_model
from cotune.ensembles.text_fusion import check_tokenizers, measure_text_fusion
from cotune.models.config import TextMethod
from cotune.models.evaluation.language_model import open_language_model


def fuse_texts(
    models: Sequence[str],
    task: TaskName,
    data: DataConfig | None,
    method: TextMethod,
    *,
    out: Path | None,
    seed: int,
    max_length: int | None,
    device: str,
) -> dict[str, Any]:
    """Return the loss of each model and of all together, and write the fused model.

    Args:
        models: Folders of models or runs, or hub ids.
        task: Of the models.
        data: Records with targets that no model was trained on, and how they are read; None: with equal weights nothing is
            fitted or measured.
        method: How their probabilities become one.
        out: A new folder for the fused model; None: it is only measured.
        seed: Of the folds.
        max_length: Tokens that are read of a record; None: as in training.
        device: What computes.
    """
    if data is not None:
        check_records(models[0], task, data)
    asked: dict[str, Any] = {"chats": data.chats, "system": data.system} if data is not None else {}
    opened = [open_language_model(model, task, device, max_length, **asked) for model in models]
    found: dict[str, Any] = {"task": task, "method": method}
    weights = [1 / len(models)] * len(models)
    if data is None:
        check_tokenizers(opened, models, chats=False)
    else:
        with own_options():
            records = read_records(data, None, task)
        found |= measure_text_fusion(method, opened, models, records, seed)
        weights = found["fused"]["weights"]
    if out is not None:
        write_fused_language_model(out, method, opened, weights, task)
        found["out"] = str(out)
    return found
