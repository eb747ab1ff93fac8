from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import RunError
from cotune.server.deployment.members import Member
from cotune.server.deployment.node_registration import NodeRegistration, reconcile
from tests.support.registration import MEMBERS, SuperLink


@given(st.sets(st.sampled_from(range(4))), st.sets(st.sampled_from(range(4))))
def test_the_members_and_nobody_else_are_known(before: set[int], wanted: set[int]) -> None:
    superlink = SuperLink(*(MEMBERS[i].key for i in before))
    said = list[str]()
    numbers = dict(superlink.known)
    reconcile(superlink, [MEMBERS[i] for i in wanted], said.append)
    assert set(superlink.known) == {MEMBERS[i].key for i in wanted}
    assert all(superlink.known[MEMBERS[i].key] == numbers[MEMBERS[i].key] for i in before & wanted)
    assert sorted(said) == sorted(
        [*(f"{MEMBERS[i].name} may join" for i in wanted - before), *("a key of nobody is shut out" for _ in before - wanted)]
    )


def test_who_is_online_is_known_by_the_key() -> None:
    superlink = SuperLink(*(each.key for each in MEMBERS))
    superlink.online = {MEMBERS[1].key, MEMBERS[3].key}
    assert reconcile(superlink, MEMBERS[:3], print) == {"b"}  # d is a member no more


def test_a_key_that_is_refused_does_not_keep_the_others_out() -> None:
    class Choosy(SuperLink):
        def register(self, key: bytes, name: str) -> int:
            if name == "b":
                raise RunError("the SuperLink refused a request")
            return super().register(key, name)

    superlink = Choosy()
    with pytest.raises(RunError, match="refused a request"):
        reconcile(superlink, MEMBERS, print)
    assert set(superlink.known) == {each.key for each in MEMBERS if each.name != "b"}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_registration_follows_the_list_over_superlink_resets() -> None:
    superlink = SuperLink()
    members = [MEMBERS[0]]
    said = list[str]()
    with NodeRegistration(lambda: nullcontext(superlink), lambda: members, said.append, interval=0.01):
        until(lambda: MEMBERS[0].key in superlink.known)
        members[:] = [MEMBERS[0].model_copy(update={"revoked": "2026-01-02"}), MEMBERS[1]]
        until(lambda: set(superlink.known) == {MEMBERS[1].key})
        superlink.down = True
        until(lambda: "at present" in said[-1])
        superlink.known = {}
        superlink.down = False
        until(lambda: set(superlink.known) == {MEMBERS[1].key})
        superlink.online = {MEMBERS[1].key}
        until(lambda: said[-1] == "b is online")
        superlink.online = set()
        until(lambda: said[-1] == "b is offline")
    assert said == [
        "a may join",
        "a is shut out",
        "b may join",
        "the SuperLink does not know at present who may join: the SuperLink cannot be reached",
        "b may join",
        "the SuperLink knows who may join",
        "b is online",
        "b is offline",
    ]


def test_superlink_not_there_yet_is_awaited_silently() -> None:
    superlink = SuperLink()
    said = list[str]()
    superlink.down = True
    with NodeRegistration(lambda: nullcontext(superlink), list, said.append, interval=0.01) as enrolment:
        time.sleep(0.05)
        assert not enrolment.ready
        superlink.down = False
        until(lambda: enrolment.ready)
    assert said == []


def test_damaged_list_is_reported_once_and_followed_once_repaired() -> None:
    superlink = SuperLink()
    said = list[str]()
    damaged = [False]

    def members() -> list[Member]:
        if damaged[0]:
            raise ValueError("a list that nobody foresaw")
        return [MEMBERS[0]]

    with NodeRegistration(lambda: nullcontext(superlink), members, said.append, interval=0.01) as enrolment:
        until(lambda: enrolment.ready)
        damaged[0] = True
        until(lambda: len(said) == 2)
        time.sleep(0.05)
        damaged[0] = False
        until(lambda: len(said) == 3)
    assert said[1:] == [
        "the SuperLink does not know at present who may join: a list that nobody foresaw",
        "the SuperLink knows who may join",
    ]
    assert set(superlink.known) == {MEMBERS[0].key}
