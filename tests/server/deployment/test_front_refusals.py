from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cotune.server.deployment.front_refusals import RefusalLog, RefusalWatch, read_refusals, read_strangers
from cotune.server.runs.events import Events, observe_run, read_events
from cotune.storage import json_documents
from cotune.storage.files import atomic_write
from tests.support.events import make_event

SOON = 0.05  # seconds in which the file is not written again


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "refused.json"


def noted(file: Path, member: str, times: int, reason: str = "its source is another node") -> None:
    """By a front that was started for it, once the file says so."""
    front = RefusalLog(file, SOON)
    before = count_of(file, member)
    for _ in range(times):
        front.record_member(member, reason)
    written(file, member, before + times)


def count_of(file: Path, member: str) -> int:
    found = read_refusals(file)
    return found[member].count if member in found else 0


def written(file: Path, member: str, count: int) -> None:
    deadline = time.monotonic() + 600.0
    while count_of(file, member) != count:
        assert time.monotonic() < deadline, count_of(file, member)
        time.sleep(0.01)


def test_member_refusals_are_counted_over_proxy_restarts(file: Path) -> None:
    noted(file, "south", 2, "first")
    noted(file, "south", 1, "last")
    noted(file, "north", 1)
    found = read_refusals(file)
    assert {member: refused.count for member, refused in found.items()} == {"south": 3, "north": 1}
    assert found["south"].reason == "last"


def test_first_refusal_is_written_at_once_and_a_storm_seldom(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = list[bytes]()

    def counted(path: Path, content: bytes, **how: bool) -> None:
        writes.append(content)
        atomic_write(path, content, **how)

    monkeypatch.setattr(json_documents, "atomic_write", counted)
    front = RefusalLog(file, write_interval=2.0)
    for member in ("south", "north"):
        front.record_member(member, "no")
        assert count_of(file, member) == 1
    for _ in range(500):
        front.record_member("south", "no")
    assert len(writes) == 2
    written(file, "south", 501)
    assert len(writes) == 3


def test_a_full_disk_keeps_nobody_from_being_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    front = RefusalLog(file, SOON)
    monkeypatch.setattr(json_documents, "atomic_write", full)
    front.record_member("south", "no")
    assert not read_refusals(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"members": 3}', b"\xff", b'{"members": {"south": {"count": "many"}}}'])
def test_a_damaged_file_is_none(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert not read_refusals(file)
    RefusalLog(file, SOON).record_member("south", "no")
    assert read_refusals(file)["south"].count == 1


@pytest.fixture
def events(tmp_path: Path, file: Path) -> Iterator[Events]:
    """Of a run that begins when the test does, watched as the process that plays it does."""
    made = Events(tmp_path / "events.jsonl")
    with observe_run(RefusalWatch(file, made)):
        yield made


def told(events: Events) -> list[tuple[str, int, str]]:
    found = [event for event in read_events(events.path) if event["event"] == "messages_refused"]
    return [(event["organization"], event["count"], event["reason"]) for event in found]


def test_run_names_members_refused_since_its_last_check(file: Path, events: Events) -> None:
    noted(file, "south", 2, "its tree holds an object that the server has sent")
    events.write(make_event("update_received", round=1, organization="north"))
    assert told(events) == []
    events.write(make_event("update_dropped", round=1, organization="south", reason="no reply"))
    assert told(events) == [("south", 2, "its tree holds an object that the server has sent")]
    noted(file, "south", 3, "it replies to nothing")
    noted(file, "north", 1, "it is no announcement")
    events.write(make_event("round_finished", round=1))
    assert sorted(told(events)[1:]) == [("north", 1, "it is no announcement"), ("south", 3, "it replies to nothing")]
    events.write(make_event("round_finished", round=2))
    assert len(told(events)) == 3


def test_what_was_refused_before_the_run_is_not_of_it(file: Path, tmp_path: Path) -> None:
    noted(file, "south", 7)
    made = Events(tmp_path / "events.jsonl")
    with observe_run(RefusalWatch(file, made)):
        made.write(make_event("round_finished", round=1))
        assert told(made) == []
        noted(file, "south", 1)
        made.write(make_event("round_finished", round=2))
    assert [(who, count) for who, count, _ in told(made)] == [("south", 1)]


def test_a_file_that_was_restarted_is_news_again(file: Path, events: Events) -> None:
    """As somebody removes it, or it was damaged."""
    noted(file, "south", 5)
    events.write(make_event("round_finished", round=1))
    os.unlink(file)
    noted(file, "south", 2)
    events.write(make_event("round_finished", round=2))
    noted(file, "south", 1)
    events.write(make_event("round_finished", round=3))
    assert [count for _, count, _ in told(events)] == [5, 2, 1]


# --- a process that is killed


def test_refusal_between_kill_and_restart_is_reported_once(file: Path, tmp_path: Path) -> None:
    """The next process begins where the events end, and not with what the front has counted meanwhile."""
    noted(file, "south", 7)
    first = Events(tmp_path / "events.jsonl")
    with observe_run(RefusalWatch(file, first)):
        noted(file, "south", 2)
        first.write(make_event("round_finished", round=1))
        noted(file, "south", 3)  # it is killed before it looks again
    noted(file, "north", 1)
    for _ in range(2):
        again = Events(tmp_path / "events.jsonl")
        with observe_run(RefusalWatch(file, again)):
            again.write(make_event("run_started", rounds=2))
    assert [(who, count) for who, count, _ in told(again)] == [("south", 2), ("south", 3), ("north", 1)]


@pytest.mark.parametrize("content", [b"", b"{", b'{"counts": 3}'])
def test_a_damaged_beginning_is_restarted(file: Path, tmp_path: Path, content: bytes) -> None:
    noted(file, "south", 7)
    (tmp_path / "refused-before.json").write_bytes(content)
    events = Events(tmp_path / "events.jsonl")
    with observe_run(RefusalWatch(file, events)):
        noted(file, "south", 1)
        events.write(make_event("round_finished", round=1))
    assert [(who, count) for who, count, _ in told(events)] == [("south", 1)]


# --- strangers


def test_strangers_are_counted_by_address_and_members_apart(file: Path) -> None:
    front = RefusalLog(file, SOON)
    front.record_address("203.0.113.7", "too large")
    front.record_address("203.0.113.7", "far too large")
    noted_at = time.monotonic() + 600.0
    while "203.0.113.7" not in read_strangers(file):
        assert time.monotonic() < noted_at
        time.sleep(0.01)
    found = read_strangers(file)["203.0.113.7"]
    assert (found.count, found.reason) == (2, "far too large")
    assert not read_refusals(file)
    assert RefusalLog(file, SOON)._addresses == read_strangers(file)


def test_stranger_of_many_addresses_fills_no_memory_or_disk(file: Path) -> None:
    front = RefusalLog(file, SOON)
    for _ in range(3):
        front.record_address("203.0.113.7", "too large")
    for number in range(1000):
        front.record_address(f"2001:db8:0:{number:x}::/64", "too large")
    assert len(front._addresses) == 100
    assert front._addresses["203.0.113.7"].count == 3
