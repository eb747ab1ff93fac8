"""Store the updates of a round for rules that compare them: in memory if they are small, else in an unnamed temporary file.

The file lies in the run's folder and disappears with the process. After a crash, the updates are requested again.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotune.strategies.tensor_blocks import BlockTensors, Entries, flatten
from cotune.strategies.types import Update

_IN_MEMORY = 2**22  # bytes of all updates of a round together
_ALIGNED = 64  # bytes, the alignment of arrays in the file
_READ = 2**16  # entries at a time, if their type is converted


class HeldUpdates:
    """The updates of one round, in the order of their arrival."""

    def __init__(self, folder: Path | None) -> None:
        """Create an empty collection.

        Args:
            folder: For the file, 4 bytes for every parameter and organization; None: everything stays in memory.
        """
        self._folder = folder
        self._file: ScratchFile | None = None
        self._bytes = 0
        self.updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Store an update; raises OSError if the disk is full."""
        self._bytes += sum(t.numel() * t.element_size() for t in (*update.delta.values(), *update.statistics.values()))
        if self._folder is not None and self._bytes > _IN_MEMORY:
            self._file = self._file or ScratchFile(self._folder)
            update = replace(update, delta=self._file.put(update.delta), statistics=self._file.put(update.statistics))
        self.updates.append(update)

    def clear(self) -> None:
        """Drop all updates; the file stays open as long as a rule's result refers to a tensor in it."""
        self.updates = []
        self._file = None


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file: offset in bytes, NumPy's type, and shape."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class ScratchFile:
    """Tensors in an unnamed temporary file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)  # when the last tensor in it is garbage-collected
        self._end = 0
        self._map: mmap.mmap | None = None

    def put(self, tensors: Mapping[str, Tensor]) -> BlockTensors:
        """Write tensors and return them as views of the file; raises OSError if the disk is full."""
        return HeldTensors(self, {name: self._append(flatten(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()})

    def _append(self, entries: Entries, shape: tuple[int, ...]) -> _Place:
        place = _Place(self._end, entries.dtype, shape)
        data = np.ascontiguousarray(entries).data.cast("B") if entries.size else memoryview(b"")
        written = 0
        while written < len(data):
            written += os.pwrite(self._file, data[written:], place.offset + written)
        self._end += -(-len(data) // _ALIGNED) * _ALIGNED
        return place

    def read(self, place: _Place, start: int, out: Entries) -> None:
        """Read the entries of a tensor from `start` on into `out`, converted to its type.

        Args:
            place: Of the tensor.
            start: Index of the first entry in the flattened tensor.
            out: (n,) Receives n entries.

        Raises:
            OSError: If the file is shorter than what was written to it.
        """
        if out.dtype != place.dtype or not out.flags.c_contiguous:
            for first in range(0, len(out), _READ):
                part = np.empty(min(_READ, len(out) - first), place.dtype)
                self.read(place, start + first, part)
                out[first : first + len(part)] = part
            return
        data = out.data.cast("B")
        done = 0
        while done < len(data):
            found = os.preadv(self._file, [data[done:]], place.offset + start * place.dtype.itemsize + done)
            if not found:
                raise OSError("a file of updates is shorter than what was written to it")
            done += found

    def map(self, place: _Place) -> Tensor:
        """Return a memory-mapped tensor, which is read on access; changes to it do not reach the file."""
        if not math.prod(place.shape):
            return torch.from_numpy(np.zeros(place.shape, place.dtype))
        if self._map is None or len(self._map) < self._end:
            os.ftruncate(self._file, self._end)  # up to the aligned end of the last array
            self._map = mmap.mmap(self._file, self._end, access=mmap.ACCESS_COPY)
        values = np.frombuffer(self._map, place.dtype, math.prod(place.shape), place.offset)
        return torch.from_numpy(values.reshape(place.shape))


class HeldTensors(BlockTensors):
    """The tensors of one update in a file: blocks are read, and whole tensors are memory-mapped."""

    def __init__(self, file: ScratchFile, places: Mapping[str, _Place]) -> None:
        self._file = file
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        return self._file.map(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._places[name].shape

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """Return the type of a tensor's entries."""
        return self._places[name].dtype

    def read(self, name: str, start: int, out: Entries) -> None:
        """Read entries of a tensor, in the order of its memory; see `BlockTensors.read`.

        Args:
            name: Of the tensor.
            start: The first entry to read.
            out: (n,), filled with the n entries from there.
        """
        self._file.read(self._places[name], start, out)
