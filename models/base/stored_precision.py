"""Keep frozen weights in the 16 bits of their checkpoint, and compute with them as if they had been widened to float32.

A model of 8 B parameters takes 32 GB in float32 and 16 GB in the bfloat16 that its files hold; the wider copy has no bit more.
So the weights of linear layers and of tables of tokens stay as they are in the files. In float32 arithmetic a layer widens its
weight when it is called, and again for the gradient of its input: the same numbers, computed by the same operations, as with
weights in float32. In bfloat16 arithmetic (autocast) nothing is widened.

What is trained is float32: `widen` is called for a parameter before its value first changes. Norms and biases are small, and
float32 always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.modules.module import register_module_parameter_registration_hook

from cotune.models.base.lookup import BaseModelFolder

_STORED = {"BF16": torch.bfloat16, "F16": torch.float16}
_NO_NUMBERS = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64"})
# architectures whose forward passes ask no weight for its type; tests compare every bit of each
KEPT_NARROW = frozenset(
    {"gemma", "gemma2", "gpt_neox", "llama", "mistral", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"}
)


class NarrowLinear(nn.Linear):
    """A linear layer whose weight has 16 bits, and whose inputs and outputs have the type of the arithmetic around it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what a layer with the weight in the input's type returns, (…, in) -> (…, out), with its gradients."""
        weight = self.weight
        if weight.dtype == input.dtype or torch.is_autocast_enabled(input.device.type):
            return functional.linear(input, weight, self.bias)
        wide = weight.to(input.dtype)
        with recomputed(wide, lambda: weight.detach().to(input.dtype)):
            return functional.linear(input, wide, self.bias)


class NarrowEmbedding(nn.Embedding):
    """A table whose entries have 16 bits, and whose rows are handed out in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the numbers, (…) -> (…, width)."""
        rows = super().forward(input)
        return rows.float() if _is_narrow(rows) else rows  # for a moment a table may be wider: see `in_float64`


@contextmanager
def recomputed(wide: Tensor, widen: Callable[[], Tensor]) -> Iterator[None]:
    """Save nothing of a widened weight for the backward pass of what is computed within the block: it is widened again there.

    Args:
        wide: The widened weight.
        widen: Returns it once more.
    """
    place = wide.data_ptr()

    def pack(tensor: Tensor) -> Any:
        return (tensor.size(), tensor.stride()) if tensor.data_ptr() == place else tensor

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else widen().as_strided(*kept)

    with saved_tensors_hooks(pack, unpack):
        yield


def find_stored_type(folder: BaseModelFolder, architecture: str) -> torch.dtype | None:
    """Return the type that all numbers in a base model's weights have, if it is one of 16 bits; None to compute in float32.

    Args:
        folder: Of the base model.
        architecture: The `model_type` of its configuration.
    """
    if architecture not in KEPT_NARROW or not folder.has_weights:
        return None
    found: set[str] = set()
    for file in sorted(folder.path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            found.update(opened.get_slice(name).get_dtype() for name in opened.keys())  # noqa: SIM118
    types = found - _NO_NUMBERS
    return _STORED.get(types.pop()) if len(types) == 1 else None


@contextmanager
def narrow_weights(dtype: torch.dtype | None) -> Iterator[None]:
    """Let models that are built within the block have linear layers and tables of tokens of a type of 16 bits.

    Args:
        dtype: Their type; None: everything is as it is otherwise.
    """
    if dtype is None:
        yield
        return

    wide: dict[int, nn.Parameter] = {}  # by their ids, which are theirs as long as they are held

    def narrow(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.dtype == dtype or id(parameter) in wide:  # what is tied to a wide weight is that weight, and no copy
            return None
        if not parameter.is_floating_point():  # of 4 bits
            return None
        if name != "weight" or type(module) not in _NARROW:
            wide[id(parameter)] = parameter
            return None
        return nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(cast(Any, narrow))  # its stub knows of no answer
    try:
        yield
    finally:
        hook.remove()


_NARROW: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: NarrowLinear, nn.Embedding: NarrowEmbedding}


def use_narrow_layers(module: nn.Module, stay: Iterable[str] = ()) -> None:
    """Let layers with weights of 16 bits compute as those of float32, and widen all other parameters.

    Args:
        module: The model, as it was loaded within `narrow_weights`.
        stay: Prefixes of names of layers that may keep 16 bits; default: all.
    """
    allowed = tuple(stay) or ("",)
    for name, layer in module.named_modules():
        kind = _NARROW.get(type(layer))
        if kind is not None and name.startswith(allowed) and _is_narrow(layer.weight):
            layer.__class__ = kind
        else:
            for parameter in layer.parameters(recurse=False):
                widen(parameter)


def use_plain_layers(layers: Iterable[nn.Module]) -> None:
    """Let layers whose weights have been widened be plain ones again."""
    plain = {narrow: kind for kind, narrow in _NARROW.items()}
    for layer in layers:
        kind = plain.get(type(layer))
        if kind is not None and not _is_narrow(cast(Tensor, layer.weight)):
            layer.__class__ = kind


def widen(parameter: Tensor) -> None:
    """Give a parameter float32, with the same numbers, in the place that it has in its layers."""
    if _is_narrow(parameter):
        parameter.data = parameter.data.float()


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.dtype in _STORED.values()
