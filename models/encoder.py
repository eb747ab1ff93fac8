"""Which part of a model is its encoder, and which its head, which alone is drawn anew, and trained by `train = head`."""

from __future__ import annotations

from typing import Any

from torch import nn

from cotune.models.errors import ModelError


def encoder_name(module: Any) -> str:
    """Return the attribute that holds the encoder of a classifier of transformers.

    It is called as the class says, but for some that classify with a part of their base model: of CLIP and SigLIP it is
    `vision_model`, the only part with parameters that is no single layer.

    Raises:
        ModelError: Where nothing, or more than one part, may be the encoder.
    """
    declared = str(module.base_model_prefix)
    if isinstance(getattr(module, declared, None), nn.Module):
        return declared
    parts: list[str] = [name for name, part in module.named_children() if _is_no_single_layer(part)]
    if len(parts) != 1:
        raise ModelError(
            f"the architecture {module.config.model_type} does not say which of its parts ({', '.join(parts) or 'none'}) is the"
            " encoder: expected one beside the head; use another base model"
        )
    return parts[0]


def _is_no_single_layer(part: nn.Module) -> bool:
    return any(True for _ in part.children()) and any(True for _ in part.parameters())
