"""Keep frozen linear layers in 4 bits, and compute with what they stand for.

A layer holds the numbers of bitsandbytes, two weights to a byte and a maximum for each block. It widens them when it is called,
and again for the gradient of its input: what it computes is, to the bit, what a plain layer with the widened weights computes,
in batches of any shape. The products of bitsandbytes itself are not used, as some of them depend on the number of rows, so that
a record's scores would depend on the records beside it.

A weight is quantized as soon as it is read from its file, on the CPU: a wide copy of the whole model never exists.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from cotune.errors import ModelError
from cotune.models.base.quantization import BLOCK
from cotune.models.base.stored_precision import KEPT_NARROW, recomputed
from cotune.models.config import Quantization

_AT_ONCE = 2**20  # weights, a multiple of all blocks
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # read by transformers
_SAMPLE = "bef0f926a88a34562eeb0de1b3c5323e6aac35eda7b5b48480657d5158d29c4d"  # see `_digest_of_sample`
_NF4 = (  # Dettmers et al., NeurIPS 2023, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# architectures whose blocks are of plain linear layers, and ask no weight for its type; tests compare every bit of each
QUANTIZABLE = KEPT_NARROW | {"bert", "distilbert", "roberta", "xlm-roberta"}


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight has 4 bits.

    Attributes:
        weight: (out · in / 2, 1), uint8: two numbers of the weight to a byte, in the order of memory.
        maxima: (blocks,), float32: the largest magnitude of each block of the weight.
    """

    maxima: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return what a layer with the widened weight returns, (…, in) -> (…, out), with its gradients."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        wide = self.widened().to(dtype)
        with recomputed(wide, lambda: self.widened().to(dtype)):
            return functional.linear(input, wide, self.bias)

    def widened(self) -> Tensor:
        """Return the weight (out, in) in float32."""
        return _widen(self.weight.detach(), self.maxima.float(), (self.out_features, self.in_features))


def check_quantization(quantization: Quantization, architecture: str, name: str) -> None:
    """Check that a base model can be had in 4 bits.

    Args:
        quantization: As in the plan.
        architecture: The `model_type` of its configuration.
        name: Of the model, for errors.

    Raises:
        ModelError: If the blocks of the architecture are not known to be of plain linear layers.
    """
    if quantization != "none" and architecture not in QUANTIZABLE:
        raise ModelError(
            f"the base model {name} is a {architecture}, for which model.quantization is not supported: expected one of"
            f" {', '.join(sorted(QUANTIZABLE))}, or model.quantization = none",
            code="model.not_quantizable",
        )


@lru_cache(maxsize=1)
def check_bitsandbytes() -> None:
    """Check that the package is there, and quantizes as everybody's does.

    Raises:
        ModelError: If it cannot be imported, or gives other bytes.
    """
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a library of CUDA that does not fit raises anything
        raise ModelError(
            f"model.quantization needs the Python package bitsandbytes, which cannot be imported ({str(error)[:120]}): run `pip"
            ' install "cotune[qlora]"`, or take a plan without it',
            code="model.no_bitsandbytes",
        ) from None
    if _digest_of_sample() != _SAMPLE:
        raise ModelError(
            f"the Python package bitsandbytes {version('bitsandbytes')} quantizes otherwise than organizations' do: expected a"
            ' version that cotune is tested with; run `pip install "cotune[qlora]"`',
            code="model.other_bitsandbytes",
        )


def _digest_of_sample() -> str:
    """SHA-256 of what is made of weights of several sizes: bytes, maxima, and what they stand for.

    Most of them lie as close as float32 can tell to where rounding goes from one number of NF4 to the next, so that the same
    operations in another order give other bytes. The last block is not whole.
    """
    table = torch.tensor(_NF4)
    largest = 1.0 + torch.arange(256)[:, None] * 7919 % 2003 / 2003  # many bits of a fraction each
    near = (table[1:] + table[:-1]) / 2 * largest
    beside = [torch.nextafter(near, torch.full_like(near, end)) for end in (torch.inf, -torch.inf)]
    blocks = functional.pad(torch.cat([largest, near, *beside], dim=1), (0, BLOCK - 1 - 3 * near.shape[1]))
    weight = torch.cat([blocks.flatten(), 1e-3 * blocks[0], torch.zeros(BLOCK), blocks[1:].flatten()[: BLOCK // 2] / 7])
    packed, maxima = _quantize(weight)
    found = (packed, maxima, _widen(packed, maxima, (1, len(weight))))
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in found)).hexdigest()


@contextmanager
def quantized_blocks(quantization: Quantization) -> Iterator[None]:
    """Let linear layers whose weights are read within the block have 4 bits, if they are in the list of a model's blocks.

    Embeddings, heads and output layers are in no list, and stay as they are; so does what no file holds.

    Args:
        quantization: As in the plan; none: everything is as it is otherwise.

    Raises:
        ModelError: bitsandbytes is not there.
    """
    if quantization == "none":
        yield
        return
    check_bitsandbytes()
    places: dict[nn.Module, nn.Module] = {}
    here = get_ident()

    def place(module: nn.Module, _: str, child: nn.Module | None) -> None:
        if child is not None:
            places[child] = module

    def quantize(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        read = getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta  # transformers marks what it has read
        if name != "weight" or type(module) is not nn.Linear or not read or not _is_in_list(module, places):
            return None
        if get_ident() != here:  # hooks are the process's, and what another thread loads meanwhile is not to be quantized
            return None
        return quantize_layer(module, parameter.detach())

    hooks = [
        register_module_module_registration_hook(cast(Any, place)),  # its stub knows of no answer
        register_module_parameter_registration_hook(cast(Any, quantize)),
    ]
    try:
        with _read_one_by_one():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _read_one_by_one() -> Iterator[None]:
    """Let transformers read a weight when the one before it is quantized: its threads would read all of them by then."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


def _is_in_list(module: nn.Module, places: Mapping[nn.Module, nn.Module]) -> bool:
    above = places.get(module)
    while above is not None and not isinstance(above, nn.ModuleList):
        above = places.get(above)
    return above is not None


def quantize_layer(layer: nn.Linear, weight: Tensor) -> nn.Parameter:
    """Let a layer compute with a weight in 4 bits, and return the bytes, which the caller gives it as its weight.

    Args:
        layer: A plain one; it becomes a `QuantizedLinear`.
        weight: (out, in), of any float type.
    """
    packed, maxima = _quantize(weight)
    layer.__class__ = QuantizedLinear
    layer.register_buffer("maxima", maxima)
    replaced = nn.Parameter(packed, requires_grad=False)
    for tensor in (replaced, maxima):
        cast(Any, tensor)._is_hf_initialized = True  # else transformers draws them anew
    return replaced


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes, and the maxima: NaN where a weight is no number, which a maximum may pass over."""
    from bitsandbytes.functional import quantize_4bit

    parts = [
        quantize_4bit(part.float(), blocksize=BLOCK, quant_type="nf4")
        for part in torch.split(weight.flatten(), _AT_ONCE)  # what bitsandbytes computes in between has 16 bytes a weight
    ]
    packed = torch.cat([part for part, _ in parts])
    maxima = torch.cat([state.absmax for _, state in parts])
    return packed, maxima if bool(weight.isfinite().all()) else torch.full_like(maxima, torch.nan)


def _widen(packed: Tensor, maxima: Tensor, shape: tuple[int, int]) -> Tensor:
    """As rows of one block each: bitsandbytes 0.50 gives wrong numbers on a CPU where a row has no whole number of blocks.

    A row of an odd number of weights it would have a compiler translate, for seconds and for each size.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    count = math.prod(shape)
    rows = (count // BLOCK, BLOCK) if count % BLOCK == 0 else (1, count + count % 2)
    state = QuantState(maxima, torch.Size(rows), blocksize=BLOCK, quant_type="nf4", dtype=torch.float32)
    return cast(Tensor, dequantize_4bit(packed, state)).flatten()[:count].reshape(shape)


def use_wide_layers(module: nn.Module) -> None:
    """Let all layers of 4 bits in a module be plain ones in float32, with the numbers that they computed with."""
    for layer in list(module.modules()):
        if isinstance(layer, QuantizedLinear):
            layer.weight = nn.Parameter(layer.widened(), requires_grad=False)
            del layer.maxima
            cast(nn.Module, layer).__class__ = nn.Linear


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module; one of 4 bits counts as one."""
    packed = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    more = sum(layer.out_features * layer.in_features - layer.weight.numel() for layer in packed)
    return more + sum(parameter.numel() for parameter in module.parameters())
