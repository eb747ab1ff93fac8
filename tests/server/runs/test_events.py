from __future__ import annotations

import json
import multiprocessing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import RunError
from cotune.server.app import train_rounds
from cotune.server.runs.events import Events, follow, observe_run, read_events
from cotune.server.runs.run_folder import RunFolder
from tests.support.events import make_event
from tests.support.failures import fails_with
from tests.support.organizations import adding, federation, model_of
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import full_disk

FIELDS = {
    "run_started": {"folder", "plan", "plan_id", "rounds", "resumed_after"},
    "round_started": {"round", "stage", "organizations"},
    "update_received": {"round", "organization", "bytes", "steps", "epsilon"},
    "update_dropped": {"round", "organization", "reason"},
    "round_finished": {
        *(
            "round",
            "stage",
            "metrics",
            "epsilon",
            "disclosures",
            "client_privacy",
            "participants",
            "dropped",
            "quarantined",
            "absent",
            "timed_out",
            "excluded",
            "late",
            "bytes_up",
            "bytes_down",
            "seconds",
            "weights",
            "norms",
            "applied",
            "suspects",
        ),
    },
    "run_failed": {"round", "reason"},
    "run_finished": {"rounds"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def told(path: Path) -> list[dict[str, Any]]:
    """The events without their times."""
    return [{key: value for key, value in event.items() if key != "at"} for event in read_events(path)]


def test_an_event_is_one_line_with_its_time_and_its_fields(path: Path) -> None:
    Events(path).write(make_event("round_started", round=3, organizations=["Zürich", 'a "quoted"\nname'], reason=None))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    event = json.loads(line)
    at = datetime.fromisoformat(event.pop("at"))
    assert at.utcoffset() == timedelta(0)
    assert event == {"event": "round_started", "round": 3, "organizations": ["Zürich", 'a "quoted"\nname'], "reason": None}
    assert told(path) == [event]


def test_listeners_hear_what_is_written_during_their_block_only(path: Path) -> None:
    events = Events(path)
    heard = list[Any]()
    events.write(make_event("before"))
    with pytest.raises(ValueError, match="end of the block"), observe_run(lambda event, fields: heard.append((event, fields))):
        events.write(make_event("within", round=1))
        Events(path, silent=True).write(make_event("silent"))
        raise ValueError("end of the block")
    events.write(make_event("after"))
    assert heard == [("within", {"round": 1})]
    assert [event["event"] for event in read_events(path)] == ["before", "within", "silent", "after"]


def test_a_last_line_that_a_crash_cut_short_is_ended_and_skipped(path: Path) -> None:
    events = Events(path)
    events.write(make_event("first"))
    events.write(make_event("second", reason="cut"))
    path.write_bytes(path.read_bytes()[:-5])
    assert [event["event"] for event in read_events(path)] == ["first"]
    Events(path).write(make_event("third"))
    assert [event["event"] for event in read_events(path)] == ["first", "third"]
    assert len(path.read_bytes().splitlines()) == 3


def test_line_cut_short_by_a_full_disk_leaves_the_next_whole(path: Path) -> None:
    events = Events(path)
    events.write(make_event("first"))
    with full_disk(path.stat().st_size + 20), fails_with("run.not_writable", "events.jsonl"):
        events.write(make_event("second"))
    assert path.read_bytes()[-20:].startswith(b'{"at"')
    events.write(make_event("third"))
    assert [event["event"] for event in read_events(path)] == ["first", "third"]


@settings(max_examples=60, deadline=None)
@given(kept=st.integers(0, 200), name=st.text(st.characters(codec="utf-8"), max_size=12))
def test_whole_events_are_read_wherever_a_line_is_cut(tmp_path_factory: pytest.TempPathFactory, kept: int, name: str) -> None:
    path = tmp_path_factory.mktemp("cut") / "events.jsonl"
    events = Events(path)
    events.write(make_event("first", organization=name))
    whole = len(path.read_bytes())
    events.write(make_event("second", organization=f"Köln {name} 北京"))
    content = path.read_bytes()
    cut = min(whole + kept, len(content) - 2)  # somewhere in the second line
    path.write_bytes(content[:cut])
    Events(path).write(make_event("third", organization=name))
    assert told(path) == [{"event": "first", "organization": name}, {"event": "third", "organization": name}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n"])
def test_a_reason_with_any_line_separator_in_it_is_read_back(path: Path, separator: str) -> None:
    Events(path).write(make_event("update_dropped", reason=f"one{separator}two"))
    assert told(path) == [{"event": "update_dropped", "reason": f"one{separator}two"}]


def _tell_many(path: Path, who: int) -> None:
    events = Events(path)
    for i in range(200):
        events.write(make_event("step", who=who, i=i, padding="x" * 300))


def test_lines_of_several_writers_do_not_mix(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_tell_many, args=(path, who)) for who in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = read_events(path)
    assert {(event["who"], event["i"]) for event in found} == {(who, i) for who in range(2) for i in range(200)}


def test_every_event_of_a_run_has_the_documented_fields(new_run: NewRun) -> None:
    folder = new_run("a", "b", "c", rounds=2, server={"quorum": 0.6})

    def fails(request: Any) -> Any:
        raise ValueError("out of memory")

    def fails_later(request: Any) -> Any:
        return adding(1.0)(request) if request.round == 1 else fails(request)

    answers = {"a": adding(1.0), "b": fails_later, "c": fails}
    with pytest.raises(RunError):
        train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), lambda state: None)
    again = {**answers, "b": adding(1.0)}
    train_rounds(federation(folder.plan, again), folder, model_of(folder.plan), lambda state: None)
    events = told(folder.path / "events.jsonl")
    assert [event["event"] for event in events] == [
        *("run_started", "round_started", "update_received", "update_received", "update_dropped", "round_finished"),
        *("round_started", "update_received", "update_dropped", "update_dropped", "run_failed"),
        *("run_started", "round_started", "update_received", "update_received", "update_dropped", "round_finished"),
        "run_finished",
    ]
    for event in events:
        assert event.keys() == {"event", *FIELDS[event["event"]]}
    assert [event["resumed_after"] for event in events if event["event"] == "run_started"] == [0, 1]


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=8), names=st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_a_follower_hears_every_event_once_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], names: list[str]
) -> None:
    path = tmp_path_factory.mktemp("follow") / "events.jsonl"
    for name in names:
        Events(path).write(make_event("update_received", organization=name))
    content = path.read_bytes()
    whole = read_events(path)
    growing = path.with_name("growing.jsonl")
    heard = []
    offset = 0
    for end in [*sorted(cuts), len(content)]:
        growing.write_bytes(content[:end])
        events, offset = follow(growing, offset)
        heard += events
    assert heard == whole
    assert (offset, follow(growing, offset)) == (len(content), ([], len(content)))


def test_follow_waits_for_line_ends_and_skips_cut_lines(path: Path) -> None:
    assert follow(path) == ([], 0)
    events = Events(path)
    events.write(make_event("first"))
    first, offset = follow(path)
    events.write(make_event("second"))
    path.write_bytes(path.read_bytes()[:-5])
    assert [event["event"] for event in first] == ["first"]
    assert follow(path, offset) == ([], offset)
    Events(path).write(make_event("third"))
    assert [event["event"] for event in follow(path, offset)[0]] == ["third"]


def test_reader_leaves_an_unfinished_line_to_its_writer(new_run: NewRun) -> None:
    folder = new_run("a")
    folder.events.path.write_bytes(b'{"event": "fir')
    RunFolder(folder.path)
    assert folder.events.path.read_bytes() == b'{"event": "fir'


def _tell_slowly(path: Path) -> None:
    events = Events(path)
    for i in range(300):
        events.write(make_event("step", i=i, padding="x" * (i * 50)))


def test_a_follower_beside_the_writer_misses_nothing(path: Path) -> None:
    path.parent.mkdir()
    writer = multiprocessing.get_context("fork").Process(target=_tell_slowly, args=(path,))
    writer.start()
    heard = list[int]()
    offset = 0
    while writer.is_alive() or len(heard) < 300:
        events, offset = follow(path, offset)
        heard += [event["i"] for event in events]
    writer.join()
    assert heard == list(range(300))
