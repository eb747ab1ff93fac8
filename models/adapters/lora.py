"""Low-rank adapters: which modules get one, how they are drawn, and how they are merged into the weights again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from cotune.errors import ModelError
from cotune.models.adapters.adapter import Adapter, init_lora_a, parameter_seed
from cotune.models.architecture import encoder_prefixes
from cotune.models.base.load import LoadedModel
from cotune.models.base.stored_precision import widen
from cotune.models.config import LoraConfig

_OWN_TARGETS = {"distilbert": ["q_lin", "v_lin"], "marian": ["q_proj", "v_proj"], "vit": ["q_proj", "v_proj", "query", "value"]}


OWN = "own"  # the adapters beside the shared ones that stay with an organization, as peft knows them


def inject_adapters(loaded: LoadedModel, lora: LoraConfig, seed: int, *, own: bool = False) -> None:
    """Puts peft's LoRA layers into the module, with every A drawn from the shared seed and every B zero.

    Args:
        loaded: The model.
        lora: Which layers get adapters, and of which rank.
        seed: That every A is drawn from.
        own: Whether each layer gets a second adapter of the same rank beside the first; their products are added.

    Raises:
        ModelError: For modules that cannot be adapted.
    """
    from peft import inject_adapter_in_model  # takes seconds to import, which commands that load no model need not wait for
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(build_peft_config(loaded, lora), loaded.module)
    if own:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # as is meant here
            inject_adapter_in_model(build_peft_config(loaded, lora), loaded.module, OWN)
        for layer in loaded.module.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(["default", OWN])
    for name, layer in loaded.module.named_modules():
        if isinstance(layer, nn.Linear) and ".lora_" in name and layer.weight.is_meta:  # beside a layer without its weights
            nn.init.zeros_(layer.to_empty(device="cpu").weight)
    for name, parameter in loaded.module.named_parameters():
        if ".lora_" in name:
            widen(parameter)  # peft gives them the type of the layer
        if ".lora_A." in name:
            parameter.data.copy_(init_lora_a(tuple(parameter.shape), parameter_seed(seed, name)))
    loaded.module.requires_grad_(False)


def build_peft_config(loaded: LoadedModel, lora: LoraConfig) -> Any:
    """Return peft's configuration of the adapters that a plan asks for. Raises ModelError."""
    from peft import LoraConfig as PeftLoraConfig
    from peft.tuners.lora import LoraLayer

    given = [name for name, layer in loaded.module.named_modules() if isinstance(layer, LoraLayer)]
    targets = given or _last_layers(_target_modules(loaded, lora), lora.layers)
    first: Any = loaded.module.get_submodule(targets[0])
    base = first.get_base_layer() if given else first
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        use_rslora=lora.method == "rslora",
        target_modules=targets,
        fan_in_fan_out=type(base).__name__ == "Conv1D",  # GPT-2's linear layers
    )


def _target_modules(loaded: LoadedModel, lora: LoraConfig) -> list[str]:
    """Full names of the linear modules to adapt; the head and the pooling layer are left out."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

    kind = loaded.module.config.model_type
    wanted = {**PEFT_TARGETS, **_OWN_TARGETS}.get(kind, ()) if lora.targets == "auto" else lora.targets
    modules = dict(loaded.module.named_modules())
    embeddings = sorted(n for n, m in modules.items() if isinstance(m, nn.Embedding) and n.split(".")[-1] in wanted)
    if embeddings:
        raise ModelError(
            f"lora.targets names the embedding {embeddings[0]}: expected linear modules, as an adapted embedding has no gradient"
            " per record; leave it out",
            code="model.lora_targets",
        )
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    prefixes = encoder_prefixes(loaded.module)
    inside = [n for n in linear if n.startswith(prefixes) and not f"{n}.".startswith(loaded.frozen or ("\0",))]
    chosen = [n for n in inside if n.split(".")[-1] in wanted]
    if not chosen:
        known = ", ".join(sorted({n.split(".")[-1] for n in inside}))
        raise ModelError(
            f"lora.targets = {lora.targets} matches no linear module of {kind}: expected some of {known}",
            code="model.lora_targets",
        )
    return chosen


def _last_layers(targets: Sequence[str], layers: int | None) -> list[str]:
    """Those of the targets that lie in the last `layers` transformer layers, by the first number in their names."""
    if layers is None:
        return list(targets)
    numbers = [re.search(r"\.(\d+)\.", name) for name in targets]
    count = 1 + max((int(n[1]) for n in numbers if n), default=-1)
    if layers > count:
        raise ModelError(
            f"lora.layers = {layers}, but the modules to adapt lie in {count} layers: expected at most {count}",
            code="model.lora_layers",
        )
    return [name for name, n in zip(targets, numbers, strict=True) if n and int(n[1]) >= count - layers]


def get_adapters(module: nn.Module) -> tuple[Adapter, ...]:
    """The LoRA layers of a module, in its order, with the names that their shared adapters have in a state."""
    from peft.tuners.lora import LoraLayer

    return tuple(
        Adapter(
            a=f"{name}.lora_A.default.weight",
            b=f"{name}.lora_B.default.weight",
            weight=f"{name}.weight",
            scale=float(layer.scaling["default"]),
            rank=int(layer.r["default"]),
            transposed=bool(layer.fan_in_fan_out),
        )
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    )


def merge_adapters(module: Any) -> None:
    """Adds every adapter's product into its layer and takes the adapter out: afterwards the module is a plain architecture."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            widen(layer.get_base_layer().weight)
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
