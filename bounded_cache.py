"""A cache that drops what was used longest ago. `functools.lru_cache` counts entries; here each entry may have a size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import RLock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """Values by their keys, in the order of their last use.

    Attributes:
        lock: Held during every call; hold it over several calls that belong together.
        max_entries: The most entries; None: any number.
        max_size: The most that their sizes add up to; None: any size. The entry that was used last is kept whatever its size.
        size: The sum of the sizes of all entries.
    """

    def __init__(
        self, *, max_entries: int | None = None, max_size: int | None = None, size_of: Callable[[V], int] = lambda value: 1
    ) -> None:
        """Create an empty cache.

        Args:
            max_entries: As the attribute.
            max_size: As the attribute.
            size_of: The size of a value, which must stay the same.
        """
        self.lock = RLock()
        self.max_entries = max_entries
        self.max_size = max_size
        self.size = 0
        self._size_of = size_of
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def values(self) -> list[V]:
        """Return all values; the last one was used last."""
        with self.lock:
            return list(self._entries.values())

    def get(self, key: K) -> V | None:
        """Return the value of a key and note its use; None if there is none."""
        with self.lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: K, value: V) -> None:
        """Set the value of a key, and drop those that were used longest ago as far as the bounds require it."""
        with self.lock:
            if key in self._entries:
                self.size -= self._size_of(self._entries.pop(key))
            self._entries[key] = value
            self.size += self._size_of(value)
            while len(self._entries) > 1 and self._is_full():
                _, dropped = self._entries.popitem(last=False)
                self.size -= self._size_of(dropped)

    def find(self, key: K, build: Callable[[], V]) -> V:
        """Return the value of a key, which is built and kept if there is none. Nobody else builds meanwhile."""
        with self.lock:
            found = self.get(key)
            if found is None:
                found = build()
            self.put(key, found)
            return found

    def clear(self) -> None:
        """Drop all entries."""
        with self.lock:
            self._entries.clear()
            self.size = 0

    def _is_full(self) -> bool:
        too_many = self.max_entries is not None and len(self._entries) > self.max_entries
        return too_many or (self.max_size is not None and self.size > self.max_size)
