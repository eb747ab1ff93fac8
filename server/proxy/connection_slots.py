"""Limit the open connections: those of members, and a few of strangers, which have not yet sent a request signed by a member.

A client without a key can open connections as fast as it likes. When all slots of strangers are taken, a new connection evicts
the oldest stranger of the address that has the most. So a member always gets a slot, and its first signed request moves it to a
member's slot. Nor can a few members keep the others out: when all slots of members are taken, a member with fewer than its share
evicts the oldest connection of the member that has the most.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cotune.server.proxy.limits import Limits


@dataclass(eq=False)
class Slot:
    """The slot of one connection.

    Attributes:
        address: Of the client; None if all connections come through the coordinator's own proxy.
        evict: Ends the connection.
        member: Whose connection it is, once that is known.
    """

    address: str | None
    evict: Callable[[], None]
    member: str | None = None


class Slots:
    """The open connections, in the order in which they were opened."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[Slot, None] = {}

    def enter(self, address: str | None, evict: Callable[[], None]) -> Slot | None:
        """Assign a slot to a new connection, evicting another one if necessary.

        Args:
            address: Of the client; None if all connections come through the coordinator's own proxy.
            evict: Ends the connection.

        Returns:
            Its slot; None if the address has too many connections of members already.
        """
        strangers = self._strangers()
        same = [slot for slot in self._held if address is not None and slot.address == address]
        if len(same) >= self._limits.connections_per_address:
            if not self._evict_oldest([slot for slot in same if slot.member is None]):
                return None
        elif len(strangers) >= self._limits.strangers:
            crowd = Counter(slot.address for slot in strangers)
            most = max(crowd.values())
            self._evict_oldest([slot for slot in strangers if crowd[slot.address] == most])
        slot = Slot(address, evict)
        self._held[slot] = None
        return slot

    def recognize(self, slot: Slot, member: str) -> str | None:
        """Assign a connection to the member that signed a request on it.

        Returns:
            Why the connection cannot be kept; None if it can.
        """
        if slot.member == member:
            return None
        members = [other for other in self._held if other.member is not None and other is not slot]
        held = Counter(other.member for other in members)
        own = held[member]
        if len(members) >= self._limits.connections and not self._make_room(held, own):
            return f"the members hold {len(members)} connections: raise limits.connections at the server"
        if slot.address is not None and own >= self._limits.connections_per_member:
            return f"nodes with the key of {member} hold {own} connections already: is one running elsewhere?"
        slot.member = member
        return None

    def _make_room(self, held: Counter[str | None], own: int) -> bool:
        """Evict a connection in favor of a member with `own` connections.

        Args:
            held: Number of connections of each member.
            own: Number of connections of the member that needs a slot.

        Returns:
            Whether a connection was evicted.
        """
        share = self._limits.connections // (len(held) + (not own))
        most, count = held.most_common(1)[0]
        return own < share < count and self._evict_oldest([slot for slot in self._held if slot.member == most])

    def leave(self, slot: Slot) -> None:
        """Free the slot of a connection that has ended."""
        self._held.pop(slot, None)

    def __len__(self) -> int:
        return len(self._held)

    def _strangers(self) -> list[Slot]:
        return [slot for slot in self._held if slot.member is None]

    def _evict_oldest(self, slots: list[Slot]) -> bool:
        if not slots:
            return False
        self.leave(slots[0])
        slots[0].evict()
        return True


def get_address_group(address: str) -> str:
    """Return what counts as one address: an IPv4 address (also one mapped to IPv6), or the /64 network of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))
