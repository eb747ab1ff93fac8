"""Limit the content in transfer at a time, in total and per member, as the SuperLink keeps it in memory."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cotune.server.proxy.limits import Limits


class Traffic:
    """The content in transfer. While it exceeds a limit, new requests wait, and their content is not read."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_member: Counter[str] = Counter()  # bytes
        self._changed = asyncio.Condition()
        self._announcing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def reserve(self, member: str, size: int) -> AsyncIterator[None]:
        """Reserve bytes for a member during the block; raises TimeoutError if it has to wait longer than `limits.queue`."""
        async with self._changed:
            async with asyncio.timeout(self._limits.queue):
                await self._changed.wait_for(lambda: self._has_room(member, size))
            self._by_member[member] += size
        try:
            yield
        finally:
            self._by_member = self._by_member - Counter({member: size})  # drops a member at zero
            async with self._changed:
                self._changed.notify_all()

    @asynccontextmanager
    async def announcement_turn(self, member: str) -> AsyncIterator[None]:
        """Let a member announce one reply at a time, as each locks the SuperLink's database; raises TimeoutError as `reserve`."""
        lock = self._announcing[member]  # at most one per member
        async with asyncio.timeout(self._limits.queue):
            await lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _has_room(self, member: str, size: int) -> bool:
        """Return whether `size` more bytes fit; the content of a single request always does."""
        own = self._by_member[member]
        everybody = self._by_member.total()
        if own and own + size > self._limits.in_flight_per_member:
            return False
        return not everybody or everybody + size <= self._limits.in_flight
