"""Arithmetic on tensors by blocks of entries, in float64: one pass over the memory, and beside it the memory of a block.

A whole-tensor formula in float64 makes copies of twice the model for every operation. The same formula on 64k entries at a time
works in the processor's cache, and gives the same numbers: what is done to an entry is the same, and sums over all entries add
up blocks of a fixed size in their order, so that they depend neither on the number of threads nor on where the tensors are kept.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2**16  # entries; in float64 half a MiB, which stays in the cache of a core
_STACKED = 2**18  # entries of all deltas of a stack together
_DOT = 2**13  # entries of one dot product: OpenBLAS uses one thread for so few, so that the sum is the same on every machine
_PLAIN = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16}

Entries = NDArray[Any]  # one-dimensional, of floats


class BlockTensors(Mapping[str, Tensor]):
    """Tensors that need not be in memory as a whole: those on disk, or those that are computed when they are looked at."""

    @abstractmethod
    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    @abstractmethod
    def dtype_of(self, name: str) -> np.dtype[Any]:
        """Return the type of its entries."""

    @abstractmethod
    def read(self, name: str, start: int, out: Entries) -> None:
        """Write the entries from `start` on into `out`, as many as it has."""


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of one of the tensors, without reading it."""
    return tensors.shape_of(name) if isinstance(tensors, BlockTensors) else tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> np.dtype[Any]:
    """Return NumPy's type for the entries of one of the tensors, without reading it; float64 for what NumPy has not."""
    if isinstance(tensors, BlockTensors):
        return tensors.dtype_of(name)
    return np.dtype(_PLAIN.get(tensors[name].dtype, np.float64))


def flatten(tensor: Tensor) -> Entries:
    """Return the entries of a tensor of floats in their order; its own memory, where they are contiguous."""
    plain = tensor.detach() if tensor.dtype in _PLAIN else tensor.detach().to(torch.float64)
    entries: Entries = plain.reshape(-1).numpy()
    return entries


def empty(shape: Sequence[int]) -> Tensor:
    """Return a tensor in float64 that holds anything.

    PyTorch's memory: NumPy asks for huge pages, which took seven times as long to fill on the machines where it was tried.
    """
    return torch.empty(tuple(shape), dtype=torch.float64)


def read_blocks(tensors: Mapping[str, Tensor], name: str, size: int = BLOCK) -> Iterator[tuple[slice, Entries]]:
    """Yield (where, entries) of a tensor, block by block, in float64. The entries are the caller's until the next block."""
    count = math.prod(shape_of(tensors, name))
    buffer = np.empty(min(size, count))
    source = None if isinstance(tensors, BlockTensors) else flatten(tensors[name])
    for start in range(0, count, size):
        where = slice(start, min(start + size, count))
        block = buffer[: where.stop - start]
        if source is None:
            assert isinstance(tensors, BlockTensors)
            tensors.read(name, start, block)
        else:
            block[...] = source[where]
        yield where, block


def read_stacks(deltas: Sequence[Mapping[str, Tensor]], name: str, dtype: Any = None) -> Iterator[tuple[slice, Entries]]:
    """Yield (where, (n, m) entries) of a parameter that all n deltas hold, block by block.

    Args:
        deltas: At least one; all have the same shape.
        name: Of the parameter.
        dtype: Of the entries; None: as they came, most often float32. They are the caller's until the next block.
    """
    count = math.prod(shape_of(deltas[0], name))
    width = max(1, min(count, _STACKED // len(deltas)))
    sources = [None if isinstance(delta, BlockTensors) else flatten(delta[name]) for delta in deltas]
    stack = np.empty((len(deltas), width), dtype or np.result_type(*(dtype_of(delta, name) for delta in deltas)))
    for start in range(0, count, width):
        where = slice(start, min(start + width, count))
        rows = stack[:, : where.stop - start]
        for row, delta, source in zip(rows, deltas, sources, strict=True):
            if source is None:
                assert isinstance(delta, BlockTensors)
                delta.read(name, start, row)
            else:
                row[...] = source[where]
        yield where, rows


def sum_squares(block: Entries) -> float:
    """Return Σ x² of a block in float64. It is finite where all entries are, unless they are beyond 10¹⁵⁰."""
    return sum(float(np.dot(part, part)) for part in (block[i : i + _DOT] for i in range(0, len(block), _DOT)))


def measure(tensors: Mapping[str, Tensor]) -> float:
    """Return Σ x² over all entries of all tensors; the same whatever the order of the tensors.

    Float32 entries are all finite exactly where it is: their squares do not overflow in float64.
    """
    with np.errstate(all="ignore"):
        return add_exactly(add_exactly(sum_squares(block) for _, block in read_blocks(tensors, name)) for name in tensors)


def is_finite(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Return whether all entries of a tensor are finite."""
    with np.errstate(all="ignore"):
        return all(math.isfinite(sum_squares(b)) or bool(np.isfinite(b).all()) for _, b in read_blocks(tensors, name))


def max_abs(tensors: Mapping[str, Tensor], name: str) -> float:
    """Return the largest absolute value of a tensor's entries; NaN where one is no number, 0 where there is none."""
    return float(np.max([0.0, *(np.abs(block).max() for _, block in read_blocks(tensors, name))]))


def add_exactly(values: Iterable[float]) -> float:
    """Return the sum of values ≥ 0, rounded once, so that their order does not matter; what is not finite stays so."""
    found = list(values)
    try:
        return math.fsum(found)
    except OverflowError:
        return math.inf
