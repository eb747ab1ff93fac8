from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from cotune.client.audit_log import AuditLog, record_sizes
from cotune.protocol.signatures import content_digest
from tests.support.failures import fails_with


def test_each_line_holds_the_hash_of_the_line_before(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    assert (log.entries(), log.last(), log.head) == ([], {}, "0" * 64)
    log.append("update", round=1, plan="é")
    log.append("refusal", round=2, reason="two\nlines")
    first, second = log.file.read_bytes().splitlines()
    assert json.loads(first)["before"] == "0" * 64
    assert json.loads(second)["before"] == hashlib.sha256(first).hexdigest()
    assert log.head == hashlib.sha256(second).hexdigest()
    assert [(entry["what"], entry["round"]) for entry in log.entries()] == [("update", 1), ("refusal", 2)]
    assert log.last()["reason"] == "two\nlines"
    assert stat.S_IMODE(log.file.stat().st_mode) == 0o600


@pytest.mark.parametrize("letter", ["a", "\U0001f3e5", "\x00", "\ud800"])
def test_no_words_of_a_server_break_the_chain(tmp_path: Path, letter: str) -> None:
    """Fifty long names, and a long reason: each line must be found again when the next one is written."""
    log = AuditLog(tmp_path)
    for round in range(2):
        log.append("update", round=round, disclosures=[200_000 * letter] * 50, reason=200_000 * letter)
    assert [entry["round"] for entry in log.entries()] == [0, 1]
    assert log.last()["reason"] == 1000 * letter


def changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'"round": 0', b'"round": 9'), *lines[1:]]


def removed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def put_in(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[0], *lines[1:]]


def exchanged(lines: list[bytes]) -> list[bytes]:
    return [lines[1], lines[0], *lines[2:]]


@pytest.mark.parametrize("change", [changed, removed, put_in, exchanged])
def test_what_was_done_to_the_file_shows(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    log = AuditLog(tmp_path)
    for round in range(3):
        log.append("update", round=round)
    assert len(log.entries()) == 3
    log.file.write_bytes(b"".join(change(log.file.read_bytes().splitlines(keepends=True))))
    with fails_with("run.changed_log"):
        log.entries()


def test_a_power_cut_in_a_line_is_seen_and_survived(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.append("update", round=1)
    log.append("update", round=2)
    log.file.write_bytes(log.file.read_bytes()[:-30])
    log.append("update", round=3)
    assert [entry["what"] for entry in log.entries()] == ["update", "unfinished", "update"]


def test_several_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda round: AuditLog(tmp_path).append("update", round=round), range(40)))
    assert sorted(entry["round"] for entry in AuditLog(tmp_path).entries()) == list(range(40))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is had from /dev/full")
def test_on_a_full_disk_nothing_is_promised(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    os.symlink("/dev/full", log.file)
    with fails_with("run.not_writable", "audit.jsonl"):
        log.append("update", round=1)


def test_the_digest_is_of_names_kinds_and_values() -> None:
    def content(**changes: object) -> RecordDict:
        given = {"name": "w", "values": np.ones(2, dtype=np.float32), "examples": 3} | changes
        arrays = ArrayRecord({str(given["name"]): Array(np.asarray(given["values"]))})
        return RecordDict({"delta": arrays, "update": ConfigRecord({"examples": given["examples"]})})  # type: ignore[dict-item]

    digests = [
        content_digest(c)
        for c in (
            content(),
            content(name="v"),
            content(values=np.zeros(2, dtype=np.float32)),
            content(values=np.ones((2, 1), dtype=np.float32)),
            content(examples=4),
            content(examples="3"),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert content_digest(content()) == digests[0]
    assert record_sizes(content())["update"] == len("examples") + 8
