"""The adapters of a fine-tuned model as a PEFT folder: what anyone puts on the base model with `PeftModel.from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cotune.models.adapters.lora import build_peft_config
from cotune.models.trainable import TrainableModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def export_adapters(model: TrainableModel, folder: Path) -> None:
    """Write `adapter_config.json` and the factors, small beside the merged model, as peft saves them.

    The base model is named as the plan names it: where it is a folder, by the folder's name alone.

    Args:
        model: In the state that is to be exported, with adapters, of a task that keeps its base model's head, or with heads of
            several tasks: then the adapters are for the encoder alone, as `AutoModel` loads it.
        folder: Where to; it is made.
    """
    assert model.lora is not None, "there are adapters"
    names = model.adapter_names()
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = build_peft_config(model.loaded, model.lora)
    config.base_model_name_or_path = model.loaded.folder.path.name
    prefix = model.prefix[0] if model.loaded.task.has_several_heads else ""
    config.target_modules = sorted(name.removeprefix(prefix) for name in config.target_modules)
    paired = getattr(model.loaded.module.config, "is_encoder_decoder", False)
    config.task_type = "FEATURE_EXTRACTION" if prefix else "SEQ_2_SEQ_LM" if paired else "CAUSAL_LM"
    config.inference_mode = True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = model.state(names)
    tensors = {f"base_model.model.{name.removeprefix(prefix).replace('.default.', '.')}": state[name] for name in names}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
