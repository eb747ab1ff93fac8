"""What one member may take, by the rules alone and by a clock of the test; the sockets are in test_server.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cotune.server.proxy.allowed_calls import Refusal
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.member_quotas import DAY, HOUR, Allowance, Quotas, Usage

MIB = 2**20
CHUNK = 5 * MIB
SMALL = Quotas(messages=3, reply=64 * MIB, bytes=128 * MIB, disk=64 * MIB)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def status(refusal: Refusal | None) -> int | None:
    return refusal and refusal.status


def test_quota_for_unrequested_replies_ends_and_returns(clock: Clock) -> None:
    usage = Usage(SMALL, clock)
    assert [status(usage.take_message("m")) for _ in range(5)] == [None, None, None, 429, 429]
    clock.now = HOUR / 3 + 1
    assert [status(usage.take_message("m")) for _ in range(2)] == [None, 429]
    clock.now = 10 * HOUR
    assert [status(usage.take_message("m")) for _ in range(4)] == [None, None, None, 429]


def test_every_request_allows_a_reply(clock: Clock) -> None:
    usage = Usage(SMALL, clock)
    for _ in range(1000):
        usage.record_requests("m", 1)
        assert usage.take_message("m") is None


def test_bytes_come_to_an_end_in_both_directions_and_come_back(clock: Clock) -> None:
    usage = Usage(Quotas(reply=64 * MIB, bytes=64 * MIB), clock)
    for _ in range(13):
        assert usage.take("m", "pull-object", 100) is None
        usage.record_response("m", "pull-object", CHUNK)
    assert status(usage.take("m", "pull-object", 100)) == 429
    assert status(usage.take("m", "push-object", CHUNK)) == 429
    assert usage.take("m", "send-node-heartbeat", 100) is None
    clock.now = 2 * HOUR
    assert usage.take("m", "push-object", CHUNK) is None


def test_disk_comes_to_an_end_and_comes_back_in_a_day(clock: Clock) -> None:
    usage = Usage(Quotas(reply=64 * MIB, bytes=10_000 * MIB, disk=64 * MIB), clock)
    assert [status(usage.take("m", "push-object", CHUNK)) for _ in range(14)] == [None] * 12 + [507] * 2
    assert usage.take("m", "pull-object", 100) is None
    clock.now = HOUR
    assert [status(usage.take("m", "push-object", 2 * MIB)) for _ in range(4)][-1] == 507
    clock.now = 2 * DAY
    assert usage.take("m", "push-object", CHUNK) is None


def test_what_one_member_takes_is_nobody_elses(clock: Clock) -> None:
    usage = Usage(SMALL, clock)
    while usage.take_message("mallory") is None:
        pass
    while usage.take("mallory", "push-object", CHUNK) is None:
        pass
    assert usage.take_message("north") is None
    assert usage.take("north", "push-object", CHUNK) is None


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10),  # times that a request is handed over, as a node reconnects and is asked again
            st.integers(0, 64 * MIB),  # its bytes
            st.integers(0, 64 * MIB),  # of the reply
            st.floats(0.0, 0.01),  # seconds that the round takes
        ),
        max_size=60,
    )
)
def test_honest_member_of_fast_rounds_reaches_no_quota(
    rounds: list[tuple[int, int, int, float]],
) -> None:
    """With the least spare of everything that a coordinator can set, and messages as large as the plan can make them."""
    clock = Clock()
    usage = Usage(Quotas(messages=1, reply=64 * MIB, bytes=128 * MIB, disk=64 * MIB), clock)
    for times, request, reply, seconds in rounds:
        clock.now += seconds
        usage.record_requests("north", times)
        for size in (MIB,) * (request // MIB):
            assert usage.take("north", "pull-object", 0) is None
            usage.record_response("north", "pull-object", size)
        assert usage.take_message("north") is None
        for size in (MIB,) * (reply // MIB):
            assert usage.take("north", "push-object", size) is None


@given(st.lists(st.tuples(st.sampled_from(("hand over", "announce", "push", "wait")), st.integers(0, 6 * MIB)), max_size=200))
def test_member_takes_no_more_than_requested_and_the_spare(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    asked = 0
    announced = 0
    pushed = 0
    usage = Usage(SMALL, clock)
    for what, amount in steps:
        if what == "wait":
            clock.now += amount / MIB
        elif what == "hand over":
            usage.record_requests("m", 1)
            asked += 1
        elif what == "announce":
            announced += usage.take_message("m") is None
        else:
            pushed += amount * (usage.take("m", "push-object", amount) is None)
    assert announced <= SMALL.messages * (1 + clock.now / HOUR) + asked + 1e-6
    assert pushed <= SMALL.max_disk * (1 + clock.now / DAY) + asked * SMALL.reply + 1e-3


@given(st.lists(st.tuples(st.sampled_from(("take", "spend", "give")), st.integers(0, 200), st.floats(0, 50)), max_size=50))
def test_an_allowance_stays_within_its_bounds(steps: list[tuple[str, int, float]]) -> None:
    clock = Clock()
    allowance = Allowance(100, 10.0, clock)
    for what, amount, seconds in steps:
        clock.now += seconds
        before = allowance.left
        done = getattr(allowance, what)(amount)
        if what == "take":
            assert bool(done) == (amount <= before)
        assert -100 <= allowance.left <= 100


def test_one_object_always_fits() -> None:
    """Whatever a coordinator sets: otherwise nobody could ever answer."""
    least = Quotas(reply=64 * MIB, bytes=64 * MIB, disk=64 * MIB)
    assert min(least.max_bytes, least.max_disk, least.reply) > Limits().push_object
    for name in ("reply", "bytes", "disk"):
        with pytest.raises(ValidationError):
            Quotas.model_validate({name: MIB})
    with pytest.raises(ValidationError):
        Quotas(messages=0)
