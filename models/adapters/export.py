"""The adapters of a fine-tuned model as a PEFT folder: what anyone puts on the base model with `PeftModel.from_pretrained`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cotune.models.adapters.lora import OWN, build_peft_config
from cotune.models.trainable import State, TrainableModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def has_adapters_alone(model: TrainableModel) -> bool:
    """Return whether the adapters are of use without the rest: the head is the base model's own, or there is one per task."""
    return model.lora is not None and (model.loaded.task.keeps_head or model.loaded.task.has_several_heads)


def export_adapters(model: TrainableModel, folder: Path, base: str | None = None) -> None:
    """Write `adapter_config.json` and the factors, small beside the merged model, as peft saves them.

    The base model is named as the plan names it: where it is a folder, by the folder's name alone. No weights of
    it are needed.

    Args:
        model: In the state that is to be exported, with adapters, of a task that keeps its base model's head, or with heads of
            several tasks: then the adapters are for the encoder alone, as `AutoModel` loads it.
        folder: Where to; it is made.
        base: Name of the base model; by default that of its folder.
    """
    assert model.lora is not None, "there are adapters"
    state = _side_by_side(model)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = build_peft_config(model.loaded, model.lora)
    config.base_model_name_or_path = base or model.loaded.folder.path.name
    if model.own_adapter_names():  # one adapter of twice the rank, at the same scale
        config.r = 2 * model.lora.rank
        config.lora_alpha = model.lora.alpha * (math.sqrt(2) if config.use_rslora else 2)
    prefix = model.prefix[0] if model.loaded.task.has_several_heads else ""
    config.target_modules = sorted(name.removeprefix(prefix) for name in config.target_modules)
    paired = getattr(model.loaded.module.config, "is_encoder_decoder", False)
    config.task_type = "FEATURE_EXTRACTION" if prefix else "SEQ_2_SEQ_LM" if paired else "CAUSAL_LM"
    config.inference_mode = True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {f"base_model.model.{n.removeprefix(prefix).replace('.default.', '.')}": tensor for n, tensor in state.items()}
    quantization = model.loaded.folder.quantization
    trained_on = {} if quantization == "none" else {"base_quantization": quantization}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **trained_on})


def _side_by_side(model: TrainableModel) -> State:
    """Its adapters by the names of the shared ones; with own ones beside them [A; A'] and [B, B'], whose product is their sum."""
    state = model.state(model.adapter_names())
    own = set(model.own_adapter_names())
    if not own:
        return state
    shared = {name: tensor for name, tensor in state.items() if name not in own}
    beside = {name: state[name.replace(".default.", f".{OWN}.")] for name in shared}
    return {n: torch.cat([t, beside[n]], dim=0 if ".lora_A." in n else 1) for n, t in shared.items()}
