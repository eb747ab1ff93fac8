"""Members that hold all connections there are for members, so that no other member gets in.

On commit 15d5778 four members of a federation, each from an address of its own and with its own key, held 64 connections each: of the 256 for
members none was left, and every honest one that was not connected yet, or whose connection ended, was refused (503) for as long as the
four signed a heartbeat on each in half a minute.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.server.proxy.connection_slots import Slot, Slots
from cotune.server.proxy.limits import Limits


class Door:
    """Members that come, each from its own address."""

    def __init__(self, limits: Limits) -> None:
        self.slots = Slots(limits)
        self.held = list[Slot]()
        self.cut = list[str | None]()

    def come(self, member: str) -> str | None:
        """Why it cannot stay, if it cannot."""
        made = list[Slot]()
        slot = self.slots.enter(f"address of {member}", lambda: self._evict(made[0]))
        assert slot is not None
        made.append(slot)
        self.held.append(slot)
        refused = self.slots.recognize(slot, member)
        if refused:
            self.slots.leave(slot)
            self.held.remove(slot)
        return refused

    def _evict(self, slot: Slot) -> None:
        self.held.remove(slot)
        self.cut.append(slot.member)

    def count(self) -> Counter[str | None]:
        return Counter(slot.member for slot in self.held)


def test_four_do_not_keep_the_others_out() -> None:
    limits = Limits()
    door = Door(limits)
    for number in range(4):
        for _ in range(limits.connections_per_member):
            assert door.come(f"mallory-{number}") is None
    for honest in ("north", "south", "west"):
        for _ in range(8):
            assert door.come(honest) is None
    assert all(door.count()[honest] == 8 for honest in ("north", "south", "west"))
    assert set(door.cut) <= {f"mallory-{number}" for number in range(4)}
    assert len(door.held) == limits.connections


def test_they_do_not_get_them_back() -> None:
    door = Door(Limits(connections=8, connections_per_member=4))
    for member in ["mallory"] * 4 + ["mallet"] * 4 + ["north"]:
        assert door.come(member) is None
    assert door.come("mallory") is not None
    assert door.come("mallet") is not None
    assert door.count()["north"] == 1


@pytest.mark.parametrize("members", [3, 8, 20])
def test_connection_beyond_full_shares_is_refused(members: int) -> None:
    door = Door(Limits(connections=2 * members, connections_per_member=64))
    for name in [f"member-{i}" for i in range(members)] * 2:
        assert door.come(name) is None
    assert door.come("member-0") is not None
    assert door.cut == []


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=60))
def test_never_more_than_there_are_and_anyone_who_comes_has_one(order: list[str]) -> None:
    door = Door(Limits(connections=8, connections_per_member=6))
    for member in order:
        door.come(member)
        assert len(door.held) <= 8
        assert door.count()[member] >= 1
