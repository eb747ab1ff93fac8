"""Arithmetic on tensors in float64, block by block: one pass over the data with one block of extra memory.

A formula on whole tensors in float64 makes copies of twice the model's size for every operation. The same formula on 64k entries
at a time stays in the processor's cache and gives the same numbers: each entry goes through the same operations, and sums over
all entries add blocks of a fixed size in a fixed order, so that they depend neither on the number of threads nor on whether the
tensors are in memory or on disk.
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
    """Tensors that need not be in memory as a whole: they are on disk, or computed on access."""

    @abstractmethod
    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    @abstractmethod
    def dtype_of(self, name: str) -> np.dtype[Any]:
        """Return the type of a tensor's entries."""

    @abstractmethod
    def read(self, name: str, start: int, out: Entries) -> None:
        """Read entries of a tensor.

        Args:
            name: Of the tensor.
            start: Index of the first entry in the flattened tensor.
            out: (n,) Receives the entries start … start + n − 1, converted to its type.
        """


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor without reading it."""
    return tensors.shape_of(name) if isinstance(tensors, BlockTensors) else tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> np.dtype[Any]:
    """Return NumPy's type for the entries of a tensor without reading it; float64 for types that NumPy lacks (bfloat16)."""
    if isinstance(tensors, BlockTensors):
        return tensors.dtype_of(name)
    return np.dtype(_PLAIN.get(tensors[name].dtype, np.float64))


def flatten(tensor: Tensor) -> Entries:
    """Return the entries of a float tensor as a one-dimensional array; a view if the tensor is contiguous."""
    plain = tensor.detach() if tensor.dtype in _PLAIN else tensor.detach().to(torch.float64)
    entries: Entries = plain.reshape(-1).numpy()
    return entries


def empty(shape: Sequence[int]) -> Tensor:
    """Return an uninitialized float64 tensor.

    PyTorch allocates it: NumPy requests huge pages, which took seven times as long to fill where it was measured.
    """
    return torch.empty(tuple(shape), dtype=torch.float64)


def read_blocks(tensors: Mapping[str, Tensor], name: str, size: int = BLOCK) -> Iterator[tuple[slice, Entries]]:
    """Iterate over a tensor block by block, in float64.

    Args:
        tensors: In memory or on disk.
        name: Of the tensor.
        size: Entries per block.

    Yields:
        (slice of the flattened tensor, entries). The entries are overwritten by the next block.
    """
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
    """Iterate block by block over one parameter of n deltas side by side.

    Args:
        deltas: n ≥ 1, all of which contain the parameter in the same shape.
        name: Of the parameter.
        dtype: Of the entries; None keeps the deltas' own type, usually float32.

    Yields:
        (slice of the flattened parameter, entries (n, m)). The entries are overwritten by the next block.
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
    """Return Σ x² of a block in float64. It is finite if all entries are, unless their magnitude exceeds about 10¹⁵⁰."""
    return sum(float(np.dot(part, part)) for part in (block[i : i + _DOT] for i in range(0, len(block), _DOT)))


def measure(tensors: Mapping[str, Tensor]) -> float:
    """Return Σ x² over all entries of all tensors, independent of the order of the tensors.

    For float32 entries the sum is finite exactly if all entries are, as their squares do not overflow in float64.
    """
    with np.errstate(all="ignore"):
        return add_exactly(add_exactly(sum_squares(block) for _, block in read_blocks(tensors, name)) for name in tensors)


def is_finite(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Return whether all entries of a tensor are finite."""
    with np.errstate(all="ignore"):
        return all(math.isfinite(sum_squares(b)) or bool(np.isfinite(b).all()) for _, b in read_blocks(tensors, name))


def max_abs(tensors: Mapping[str, Tensor], name: str) -> float:
    """Return the largest absolute value in a tensor; NaN if an entry is NaN, 0 for an empty tensor."""
    return float(np.max([0.0, *(np.abs(block).max() for _, block in read_blocks(tensors, name))]))


def add_exactly(values: Iterable[float]) -> float:
    """Return the sum of values ≥ 0, rounded once, so that it does not depend on their order; infinity and NaN propagate."""
    found = list(values)
    try:
        return math.fsum(found)
    except OverflowError:
        return math.inf
