"""The fine-tuned model as a plain Hugging Face folder: `transformers.pipeline` loads it as it is, whatever the task."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from cotune.models.base import dropout_settings, quiet
from cotune.models.lora import merge_adapters
from cotune.models.sharing import SharedModel

__all__ = ["export_model"]


def export_model(model: SharedModel, folder: Path) -> None:
    """Writes safetensors, configuration with label names, and tokenizer or image processor; adapters are merged into the weights.

    An earlier export in the folder is replaced once the new one is complete. The model itself is left as it is.
    """
    module: Any = copy.deepcopy(model.loaded.module).to("cpu")
    merge_adapters(module)
    _restore_dropout(module.config, model.loaded.folder.path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".model."))
    try:
        with quiet():
            module.save_pretrained(part)
        model.loaded.reader.save_pretrained(part)
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _restore_dropout(config: Any, base: Path) -> None:
    """Training here was without dropout; who fine-tunes on gets the base model's own setting."""
    original = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    for key, value in dropout_settings(original).items():
        setattr(config, key, value)
