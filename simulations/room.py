"""How many cells of a comparison fit on this machine at a time."""

from __future__ import annotations

import os

from cotune.models.device import pick_device


class Room:
    """As many processes as were asked for, else as cores and memory allow, by what finished cells have needed.

    memory: bytes that all may have together.
    """

    def __init__(self, tasks: int, wanted: int | None, cores: int, memory: int, *, on_gpu: bool = False) -> None:
        self.wanted, self.cores, self.memory, self.needed = wanted, cores, memory, 0
        self.most = max(1, min(tasks, wanted or (1 if on_gpu else cores)))

    @classmethod
    def here(cls, tasks: int, wanted: int | None, device: str) -> Room:
        """On this machine as it is now. Raises DeviceError for a device that is not there."""
        return cls(tasks, wanted, _cores(), available_memory(), on_gpu=pick_device(device).type == "cuda")

    def saw(self, needed: int) -> None:
        """The bytes that a cell has needed."""
        self.needed = max(self.needed, needed)

    def jobs(self) -> int:
        """How many may run now: one, until it is known what one needs."""
        if self.wanted is not None:
            return self.most
        return max(1, min(self.most, self.memory // self.needed)) if self.needed else 1

    def threads(self) -> int:
        """For each, so that all together keep the cores busy."""
        return max(1, self.cores // self.most)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that new processes can have without swapping; all of the machine's where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
