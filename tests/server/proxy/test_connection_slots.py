"""Whose connections are held, by the rules alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.server.proxy.connection_slots import Slot, Slots, get_address_group
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.rate_limited_log import LINES, SECONDS, RateLimitedLog


def enter(slots: Slots, address: str | None, cut: list[str | None]) -> Slot | None:
    return slots.enter(address, lambda: cut.append(address))


def test_the_oldest_stranger_of_the_busiest_address_makes_room() -> None:
    slots = Slots(Limits(strangers=4))
    cut = list[str | None]()
    for address in ("a", "b", "b", "b", "c", "b"):
        assert enter(slots, address, cut)
    assert cut == ["b", "b"]
    assert len(slots) == 4


def test_256_idle_connections_of_four_addresses_keep_nobody_out() -> None:
    slots = Slots(Limits())
    cut = list[str | None]()
    for i in range(256):
        enter(slots, f"10.0.0.{i % 4}", cut)
    member = enter(slots, "192.0.2.1", cut)
    assert member is not None
    assert slots.recognize(member, "north") is None
    for i in range(256):
        enter(slots, f"10.0.0.{i % 4}", cut)
    assert "192.0.2.1" not in cut


def test_address_quota_counts_members_not_strangers() -> None:
    slots = Slots(Limits(connections_per_address=2))
    cut = list[str | None]()
    first = enter(slots, "a", cut)
    second = enter(slots, "a", cut)
    third = enter(slots, "a", cut)
    assert third is not None
    assert len(cut) == 1
    for slot in (second, third):
        assert slot is not None
        assert slots.recognize(slot, "north") is None
    assert enter(slots, "a", cut) is None
    assert first is not None


def test_members_have_a_limit_each_and_together() -> None:
    slots = Slots(Limits(connections=3, connections_per_member=2))
    held = [enter(slots, None if i == 9 else f"10.0.0.{i}", []) for i in range(6)]
    answers = [slots.recognize(slot, name) for slot, name in zip(held, ("a", "a", "a", "b", "c", "c"), strict=True) if slot]
    assert [answer is None for answer in answers] == [True, True, False, True, True, False]  # c takes one of a's


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=80))
def test_strangers_keep_to_their_share_and_evict_no_member(events: list[tuple[str, bool]]) -> None:
    limits = Limits(strangers=3, connections_per_address=5, connections=100)
    slots = Slots(limits)
    members = list[Slot]()
    evicted = set[int]()
    for number, (address, signs) in enumerate(events):
        slot = slots.enter(address, lambda number=number: evicted.add(number))  # type: ignore[misc]
        if slot and signs:
            assert slots.recognize(slot, address) is None
            members.append(slot)
    assert len(slots) - len(members) <= limits.strangers
    assert len(evicted) + len(slots) <= len(events)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    assert (get_address_group(one) == get_address_group(other)) == same


@given(st.text(max_size=30))
def test_any_text_has_a_group(address: str) -> None:
    assert isinstance(get_address_group(address), str)


def test_repeated_log_lines_are_limited_then_counted() -> None:
    said = list[str]()
    now = [0.0]
    sparing = RateLimitedLog(said.append, lambda: now[0])
    for i in range(100):
        sparing.write("a", f"a {i}")
    sparing.write("b", "b")
    assert said == [*(f"a {i}" for i in range(LINES)), "b"]
    now[0] = SECONDS
    sparing.write("a", "again")
    assert str(100 - LINES) in said[-2]
    assert said[-1] == "again"


def test_kinds_are_not_remembered_for_ever() -> None:
    sparing = RateLimitedLog(lambda line: None, lambda: 0.0)
    for i in range(5000):
        sparing.write(str(i), "line")
    assert len(sparing._kinds) <= 1001
