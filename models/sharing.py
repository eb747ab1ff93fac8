"""What is trained and travels: the sharing groups, and the model that moves through the stages of a plan.

A stage trains one group of parameters: the `head`; `lora` factors and the head; or `full`, the encoder and the head. The
*state* is every tensor that any stage so far has trained, by name: with it and the base model, everybody has the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from pydantic import Field
from torch import Tensor, nn

from cotune.models.base import LoadedModel, ModelConfig, load_model
from cotune.models.device import pick_device
from cotune.models.errors import ModelError
from cotune.models.table import Table

__all__ = ["LoraConfig", "SharedModel", "State", "TrainMode", "merge_adapters", "resident"]

_AUTO_TARGETS = {**PEFT_TARGETS, "distilbert": ["q_lin", "v_lin"]}
State = dict[str, Tensor]  # parameter name -> float32 tensor on the CPU
TrainMode = Literal["head", "lora", "full"]


class LoraConfig(Table):
    """Low-rank adapters (Hu et al., ICLR 2022): W + (α/r)·B·A, through peft."""

    rank: int = Field(8, ge=1, le=512, description="r")
    alpha: float = Field(16.0, gt=0, description="α; the update is scaled by α/r")
    freeze_a: bool = Field(
        True,
        description="A stays as drawn from the plan's seed and only B is trained (FFA-LoRA, Sun et al., ICLR 2024)",
    )
    targets: tuple[str, ...] | Literal["auto"] = Field(
        "auto",
        description="names of the linear modules that get an adapter (auto: what peft adapts in this architecture)",
    )


class SharedModel:
    """A loaded model with the bookkeeping of what is trained, and how to set it to any state.

    One instance is kept per process; `load` makes its parameters a function of the base model and the given state alone, so that
    simulated clients can take turns with it.
    """

    def __init__(self, loaded: LoadedModel, lora: LoraConfig | None, seed: int, device: torch.device) -> None:
        self.loaded, self.lora, self.seed, self.device = loaded, lora, seed, device
        self.module: nn.Module = loaded.module.to(device)  # on its device before peft wraps it
        self.prefix = f"{loaded.module.base_model_prefix}."
        if lora is not None:
            _inject(loaded, lora, seed)
        self._initial: State = {}

    def names(self, mode: TrainMode, *, freeze_embeddings: bool = True) -> list[str]:
        """The parameters that a stage trains and shares, in the model's order. Raises ModelError when there are none."""
        chosen = [name for name, _ in self.parameters() if self._belongs(name, mode, freeze_embeddings)]
        if not chosen:
            raise ModelError(f"the model has no parameters to train for train = {mode}: expected at least a head")
        return chosen

    def _belongs(self, name: str, mode: TrainMode, freeze_embeddings: bool) -> bool:
        if not name.startswith(self.prefix):
            return True  # the head is part of every stage
        if mode == "head" or name.startswith(self.loaded.frozen):
            return False
        if ".lora_" in name:
            return mode == "lora" and self.lora is not None and (".lora_B." in name or not self.lora.freeze_a)
        return mode == "full" and not (freeze_embeddings and _is_embedding(name))

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters by their stable names: the same with and without adapters around a layer."""
        for name, parameter in self.module.named_parameters():
            yield name.replace(".base_layer.", "."), parameter

    def train_only(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Makes the named parameters trainable and freezes all others; returns them in the model's order."""
        wanted = set(names)
        self._remember(dict(self.parameters()), wanted)
        chosen = []
        for name, parameter in self.parameters():
            parameter.requires_grad_(name in wanted)
            if name in wanted:
                chosen.append(parameter)
        return chosen

    def state(self, names: Iterable[str]) -> State:
        """Copies of the named parameters, in float32 on the CPU."""
        own = dict(self.parameters())
        return {name: own[name].detach().to("cpu", torch.float32, copy=True) for name in names}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Sets the model to the base model with `state` on top. Raises ModelError for a name or shape that it does not have."""
        own = dict(self.parameters())
        for name, tensor in state.items():
            if name not in own or own[name].shape != tensor.shape:
                got = f"{name} {tuple(tensor.shape)}"
                raise ModelError(
                    f"a state holds {got}, expected a parameter of this model: it was made with another plan or model"
                )
        self._remember(own, state)
        for name, initial in self._initial.items():
            own[name].copy_(state.get(name, initial))

    def _remember(self, own: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Keeps the base value of every tensor that is about to be changed for the first time."""
        for name in names:
            if name not in self._initial:
                self._initial[name] = own[name].detach().to("cpu", copy=True)

    def parameter_count(self) -> int:
        """All parameters of the model, adapters included."""
        return sum(p.numel() for p in self.module.parameters())


def _is_embedding(name: str) -> bool:
    return any(part in ("embeddings", "wte", "wpe", "embed_tokens", "word_embeddings") for part in name.split("."))


def _inject(loaded: LoadedModel, lora: LoraConfig, seed: int) -> None:
    """Puts peft's LoRA layers into the module, with every A drawn from the shared seed and every B zero."""
    targets = _target_modules(loaded, lora)
    transposed = type(loaded.module.get_submodule(targets[0])).__name__ == "Conv1D"  # GPT-2's linear layers
    config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets, fan_in_fan_out=transposed
    )
    inject_adapter_in_model(config, loaded.module)
    for name, parameter in loaded.module.named_parameters():
        if ".lora_A." in name:
            _draw_a(parameter, _name_seed(seed, name))
    loaded.module.requires_grad_(False)


def _target_modules(loaded: LoadedModel, lora: LoraConfig) -> list[str]:
    """Full names of the linear modules to adapt; the head and the pooling layer are left out."""
    kind = loaded.module.config.model_type
    wanted = _AUTO_TARGETS.get(kind, ()) if lora.targets == "auto" else lora.targets
    linear = [n for n, m in loaded.module.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    prefix = f"{loaded.module.base_model_prefix}."
    inside = [n for n in linear if n.startswith(prefix) and not f"{n}.".startswith(loaded.frozen or ("\0",))]
    chosen = [n for n in inside if n.split(".")[-1] in wanted]
    if not chosen:
        known = ", ".join(sorted({n.split(".")[-1] for n in inside}))
        raise ModelError(f"lora.targets = {lora.targets} matches no linear module of {kind}: expected some of {known}")
    return chosen


def _name_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


@torch.no_grad()
def _draw_a(parameter: nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(parameter.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    parameter.copy_(drawn)


def merge_adapters(module: Any) -> None:
    """Adds every adapter's product into its layer and takes the adapter out: afterwards the module is a plain architecture."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())


@lru_cache(maxsize=1)
def resident(model: ModelConfig, labels: tuple[str, ...], lora: LoraConfig | None, seed: int, device: str) -> SharedModel:
    """The one model that a process keeps: loaded at the first call, shared by everybody in the process who takes turns."""
    loaded = load_model(model, labels, _name_seed(seed, "head"))
    return SharedModel(loaded, lora, seed, pick_device(device))
