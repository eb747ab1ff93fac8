"""Files of a server and a site that a full disk, a crash or a hand has damaged: one sentence that names the file, or read past it.

On commit 15d5778 a fuzzer that damaged each file of a finished real federation and of a site in a dozen ways (cut, zeros, noise, other
JSON, deep JSON, gone), some 500 in all, found two in which a command of the coordinator ended in something unforeseen: an empty
ca.crt (`server status`, `server run`), and a line of events.jsonl that is JSON and no event. A folder in the place of events.jsonl, which
nothing makes, still does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.flower.control_client import open_control
from cotune.server.runs.events import Events, follow, read_events
from tests.support.events import make_event
from tests.support.failures import fails_with


@pytest.mark.parametrize("line", [b"null", b"[1]", b"7", b'"event"', b"{}", b"\x00" * 50, b"\xff\xfe"])
def test_a_line_that_is_no_event_is_read_past(tmp_path: Path, line: bytes) -> None:
    events = Events(tmp_path / "events.jsonl", silent=True)
    events.write(make_event("run_started"))
    events.path.write_bytes(line + b"\n" + events.path.read_bytes() + line + b"\n")
    assert [event["event"] for event in read_events(events.path)] == ["run_started"]
    assert [event["event"] for event in follow(events.path)[0]] == ["run_started"]


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\n", bytes(100), b"\xff"])
def test_an_authority_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ca.crt").write_bytes(content)
    with fails_with("run.certificate_not_readable", "ca.crt"), open_control("127.0.0.1:9", tmp_path / "ca.crt"):
        raise AssertionError("entered")
