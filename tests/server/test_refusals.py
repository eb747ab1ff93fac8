from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cotune.server import refusals
from cotune.server.events import Events, listening, read_events
from cotune.server.refusals import Refusals, Watch, read_refusals


class Clock:
    """In place of time.monotonic."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(refusals, "time", made)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "refused.json"


def noted(file: Path, clock: Clock, member: str, times: int, reason: str = "its source is another node") -> None:
    """By a front that was started for it."""
    front = Refusals(file)
    for _ in range(times):
        clock.now += 1.0
        front.note(member, reason)


def test_a_members_refusals_are_counted_over_restarts_of_the_front(file: Path, clock: Clock) -> None:
    noted(file, clock, "south", 2, "first")
    noted(file, clock, "south", 1, "last")
    noted(file, clock, "north", 1)
    found = read_refusals(file)
    assert {member: refused.count for member, refused in found.items()} == {"south": 3, "north": 1}
    assert found["south"].reason == "last"


def test_the_first_of_a_member_is_written_at_once_and_a_storm_once_a_second(file: Path, clock: Clock) -> None:
    front = Refusals(file)
    written = set[int]()
    for i in range(100):
        front.note("south", "no")
        written.add(read_refusals(file)["south"].count)
        clock.now += 0.5
        if i == 50:
            front.note("north", "no")
            assert read_refusals(file)["north"].count == 1
    assert 1 in written
    assert 40 <= len(written) <= 60


def test_a_full_disk_keeps_nobody_from_being_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    front = Refusals(file)
    monkeypatch.setattr(refusals, "write_durably", full)
    front.note("south", "no")
    assert not read_refusals(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"members": 3}', b"\xff", b'{"members": {"south": {"count": "many"}}}'])
def test_a_damaged_file_is_none(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert not read_refusals(file)
    Refusals(file).note("south", "no")
    assert read_refusals(file)["south"].count == 1


@pytest.fixture
def events(tmp_path: Path, file: Path) -> Iterator[Events]:
    """Of a run that begins when the test does, watched as the process that plays it does."""
    made = Events(tmp_path / "events.jsonl")
    with listening(Watch(file, made.tell)):
        yield made


def told(events: Events) -> list[tuple[str, int, str]]:
    found = [event for event in read_events(events.path) if event["event"] == "messages_refused"]
    return [(event["organisation"], event["count"], event["reason"]) for event in found]


def test_the_run_names_whoever_was_refused_since_it_looked_last(file: Path, clock: Clock, events: Events) -> None:
    noted(file, clock, "south", 2, "its tree holds an object that the server has sent")
    events.tell("update_received", round=1, organisation="north")
    assert told(events) == []
    events.tell("update_dropped", round=1, organisation="south", reason="no reply")
    assert told(events) == [("south", 2, "its tree holds an object that the server has sent")]
    noted(file, clock, "south", 3, "it replies to nothing")
    noted(file, clock, "north", 1, "it is no announcement")
    events.tell("round_finished", round=1)
    assert sorted(told(events)[1:]) == [("north", 1, "it is no announcement"), ("south", 3, "it replies to nothing")]
    events.tell("round_finished", round=2)
    assert len(told(events)) == 3


def test_what_was_refused_before_the_run_is_not_of_it(file: Path, clock: Clock, tmp_path: Path) -> None:
    noted(file, clock, "south", 7)
    made = Events(tmp_path / "events.jsonl")
    with listening(Watch(file, made.tell)):
        made.tell("round_finished", round=1)
        assert told(made) == []
        noted(file, clock, "south", 1)
        made.tell("round_finished", round=2)
    assert [(who, count) for who, count, _ in told(made)] == [("south", 1)]


def test_a_file_that_was_begun_anew_is_news_again(file: Path, clock: Clock, events: Events) -> None:
    """As somebody removes it, or it was damaged."""
    noted(file, clock, "south", 5)
    events.tell("round_finished", round=1)
    os.unlink(file)
    noted(file, clock, "south", 2)
    events.tell("round_finished", round=2)
    noted(file, clock, "south", 1)
    events.tell("round_finished", round=3)
    assert [count for _, count, _ in told(events)] == [5, 2, 1]
