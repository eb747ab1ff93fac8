"""The physical batch: how many rows are held in memory at a time, found by itself where a plan says "auto".

What does not fit is begun again with half of the rows, and the size is remembered for the rest of the process. It decides speed,
memory and rounding; what is computed of all rows together is the same.

Under privacy no record may decide it: kernels add in an order that goes by the shape of a batch, so that a record which alone
makes memory run out would change the rounding of all others. So the size is found on made-up records of the greatest length,
before anything is charged. Where a step runs out of memory all the same, it is first repeated as it was, with all unused memory
freed: then every batch fits again that has fitted before, unless something outside of the process has taken the room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from cotune.errors import DeviceError
from cotune.models.device import free_unused_memory, is_out_of_memory
from cotune.models.local_events import notify
from cotune.models.trainable import TrainableModel

_MOST_ROWS = {"cuda": 512, "cpu": 32}  # a GPU idles on fewer; a CPU gains nothing by more, and fails late where memory is short
FEWEST_SLOTS = 2  # of a batch of a fixed shape: a record, and a blank one
T = TypeVar("T")


def first_rows(device: torch.device, expected_batch: float) -> int:
    """Return the rows that are tried first: the largest power of two that a step fills, at most what the device has a use for.

    Args:
        device: That computes.
        expected_batch: Rows of a step, a public number; infinity where it is not known.
    """
    most = _MOST_ROWS.get(device.type, _MOST_ROWS["cpu"])
    return int(2 ** math.floor(math.log2(max(2.0, min(expected_batch, most)))))


@dataclass
class _Found:
    """What a process knows of one computation. most: Rows above which memory ran out; tried: the most rows that have fitted."""

    most: float = math.inf
    tried: int = 0


_found: WeakKeyDictionary[TrainableModel, dict[Hashable, _Found]] = WeakKeyDictionary()


@dataclass
class PhysicalBatch:
    """The rows of a batch, and what becomes of a computation that does not fit.

    Attributes:
        rows: Of a batch, blank ones included.
        device: That computes.
        least: Rows below which nothing is tried; None: the number is fixed, and running out of memory is a failure as any other.
    """

    rows: int
    device: torch.device
    least: int | None = None
    _known: _Found = field(default_factory=_Found)

    @property
    def slots(self) -> int:
        """Slots of a batch of a fixed shape, in which some may be blank."""
        return max(FEWEST_SLOTS, self.rows)

    def fit(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which begins from nothing whenever it is called, and reads `rows`.

        Where it runs out of memory, it is called again: once as before, then with half of the rows each time.

        Raises:
            DeviceError: When not even the fewest rows fit.
        """
        failures = 0
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if self.least is None or not is_out_of_memory(error):
                    raise
            failures += 1  # outside of the handler: the error holds on to all tensors of what has failed
            free_unused_memory(self.device)
            if failures > 1:
                self._halve()

    def fit_first(self, work: Callable[[], object]) -> None:
        """Try whether the rows fit, unless this process has already seen as many fit; see `fit`."""
        if self.least is not None and self.rows > self._known.tried:
            self.fit(work)
            free_unused_memory(self.device)
            self._known.tried = self.rows

    def _halve(self) -> None:
        assert self.least is not None
        if self.rows <= self.least:
            raise DeviceError(
                f"the memory of {self.device} does not hold the model and the smallest batch ({self.rows}): expected room for"
                ' both; lower model.max_length, set local.activation_checkpointing = "on", or use a device with more memory',
                code="device.record_does_not_fit",
            )
        before = self.rows
        self.rows = max(self.least, before // 2)
        self._known.most = min(self._known.most, self.rows)
        self._known.tried = min(self._known.tried, self.rows)
        notify("physical_batch", rows=self.rows, before=before, device=str(self.device))


def open_batch(model: TrainableModel, what: Hashable, rows: int, least: int) -> PhysicalBatch:
    """Return a batch whose rows are found: those given, or fewer, where this process knows that they do not fit.

    Args:
        model: That computes.
        what: Decides, beside the model and the rows, how much memory is needed.
        rows: See `first_rows`.
        least: Fewest rows.
    """
    known = _found.setdefault(model, {}).setdefault(what, _Found())
    return PhysicalBatch(int(min(rows, known.most)), model.device, least, known)
