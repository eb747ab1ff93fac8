from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cotune.server.deployment.execution.process_record import ProcessRecord, find_session_processes, terminate_all

DEAF = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(600)"
PARENT = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {DEAF!r}]).wait()"


@pytest.fixture
def parent() -> Iterator[psutil.Process]:
    """A process in a session of its own, with a child that does not want to end."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield psutil.Process(process.pid)
        terminate_all(find_session_processes({process.pid}), 0.1)


def test_a_session_is_found_when_its_leader_is_gone(parent: psutil.Process) -> None:
    (child,) = parent.children()
    assert set(find_session_processes({parent.pid})) == {parent, child}
    parent.kill()
    parent.wait()
    assert set(find_session_processes({parent.pid})) == {child}
    assert set(find_session_processes({2**22 + 1})) == set()


def test_who_does_not_end_when_asked_is_ended(parent: psutil.Process) -> None:
    (child,) = parent.children()
    before = time.monotonic()
    assert terminate_all(find_session_processes({parent.pid}), 0.5) == 2
    assert time.monotonic() - before >= 0.5
    for process in (parent, child):
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_record_finds_what_runs_with_what_it_has_started_since(parent: psutil.Process, tmp_path: Path) -> None:
    ProcessRecord(tmp_path / "processes.json", print).keep([parent])
    assert set(ProcessRecord(tmp_path / "processes.json", print).left()) == {parent, *parent.children()}


def test_a_number_that_was_given_out_again_is_not_meant(parent: psutil.Process, tmp_path: Path) -> None:
    file = tmp_path / "processes.json"
    ProcessRecord(file, print).keep([parent])
    kept = json.loads(file.read_bytes())
    ((number, started),) = kept["processes"]
    file.write_text(json.dumps({**kept, "processes": [[number, started - 1]]}))
    assert ProcessRecord(file, print).left() == []
    file.write_text(json.dumps({**kept, "boot": "another"}))
    assert ProcessRecord(file, print).left() == []


@pytest.mark.parametrize("content", [None, "", "{}", '{"boot": "", "processes": 7}', '{"boot": "", "processes": [["a", 1]]}'])
def test_a_record_that_cannot_be_read_names_nobody(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "processes.json").write_text(content)
    assert ProcessRecord(tmp_path / "processes.json", print).left() == []


def test_a_record_is_written_when_something_has_changed(parent: psutil.Process, tmp_path: Path) -> None:
    file = tmp_path / "processes.json"
    record = ProcessRecord(file, print)
    record.keep([parent])
    file.unlink()
    record.keep([parent])
    assert not file.exists()
    record.keep([])
    assert ProcessRecord(file, print).left() == []


def test_a_full_disk_is_said_once_and_made_good_for(parent: psutil.Process, tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "superlink"
    folder.touch()  # nothing can be written there
    record = ProcessRecord(folder / "processes.json", said.append)
    record.keep([parent])
    record.keep([parent])
    (line,) = said
    assert line.endswith("processes.json cannot be written (Not a directory): free space, or check its permissions")
    folder.unlink()
    record.keep([parent])
    assert parent in ProcessRecord(folder / "processes.json", print).left()
    assert len(said) == 1
