"""Which connections are held: those of members, and a few of anyone who has not shown yet that it is one.

Somebody without a key can open connections as fast as it likes. It shares the strangers' slots with nobody for long: a new
connection takes the place of the oldest stranger of the address that holds most of them, so that a member needs no more than a
moment to become one. Nor do a few members keep the others out: where all connections of members are held, one that holds less
than its share takes the place of the oldest of anyone who holds most.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cotune.server.proxy.allowed_calls import Limits


@dataclass(eq=False)
class Slot:
    """A connection.

    Attributes:
        address: Of the client; None where all connections come through a proxy of the server's own.
        evict: Ends the connection.
        member: Whose it is, once that is known.
    """

    address: str | None
    evict: Callable[[], None]
    member: str | None = None


class Slots:
    """The connections that are held, in the order in which they came."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[Slot, None] = {}

    def enter(self, address: str | None, evict: Callable[[], None]) -> Slot | None:
        """Hold a new connection, evicting another where that is needed.

        Args:
            address: Of the client; None where all connections come through a proxy of the server's own.
            evict: Ends the connection.

        Returns:
            Its slot; None where the address holds too many connections of members already.
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
        """Assign a connection to the member that has signed a request on it.

        Returns:
            Why the connection cannot be kept; None where it can.
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
        """Evict a connection for a member with `own` connections; return whether one was. held: connections of each member."""
        share = self._limits.connections // (len(held) + (not own))
        most, count = held.most_common(1)[0]
        return own < share < count and self._evict_oldest([slot for slot in self._held if slot.member == most])

    def leave(self, slot: Slot) -> None:
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
    """Return what counts as one address: of IPv6 the network /64, which anybody has; an IPv4 address within IPv6 is itself."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))
