"""How much content is on its way at a time, over all connections and for each member: the SuperLink holds it in memory."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cotune.server.proxy.rules import Limits


class Traffic:
    """Anyone who comes while too much is under way waits for its turn, and is not read meanwhile."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_member: Counter[str] = Counter()  # bytes
        self._changed = asyncio.Condition()
        self._announcing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def taken(self, member: str, size: int) -> AsyncIterator[None]:
        """So many bytes, for as long as the block takes. Raises TimeoutError where there is no room within `limits.queue`."""
        async with self._changed:
            async with asyncio.timeout(self._limits.queue):
                await self._changed.wait_for(lambda: self._fits(member, size))
            self._by_member[member] += size
        try:
            yield
        finally:
            self._by_member = self._by_member - Counter({member: size})  # drops a member at zero
            async with self._changed:
                self._changed.notify_all()

    @asynccontextmanager
    async def announcing(self, member: str) -> AsyncIterator[None]:
        """One reply of a member at a time: each locks the SuperLink's database. Raises TimeoutError as `taken` does."""
        lock = self._announcing[member]  # as many as there are members
        async with asyncio.timeout(self._limits.queue):
            await lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _fits(self, member: str, size: int) -> bool:
        """One alone always does."""
        own = self._by_member[member]
        everybody = self._by_member.total()
        if own and own + size > self._limits.in_flight_per_member:
            return False
        return not everybody or everybody + size <= self._limits.in_flight
