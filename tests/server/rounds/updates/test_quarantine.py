from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import safe_open

from cotune.server.rounds.updates import buffers as quarantine
from cotune.server.rounds.updates.buffers import Quarantine
from tests.support.unreliable_grid import files


def message(**arrays: bytes) -> RecordDict:
    held = {name: Array("float32", (len(data),), "numpy.ndarray", data) for name, data in arrays.items()}
    header = ConfigRecord({"organization": "x" * 5000, "round": 3, "raw": b"\x00", "list": [1, 2]})
    return RecordDict({"delta": ArrayRecord(held), "update": header, "noise": MetricRecord({"a": 1.5})})


def read(file: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    with safe_open(file, framework="np") as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        assert all(tensor.dtype == np.uint8 for tensor in found.values())
        return {name: tensor.tobytes() for name, tensor in found.items()}, json.loads(tensors.metadata()["quarantine"])


def test_every_byte_is_kept_as_it_came_beside_what_was_wrong(tmp_path: Path) -> None:
    name = Quarantine(tmp_path).keep(message(a=b"\x80\x04N.", b=b""), "Zürich", 3, "it cannot be read")
    assert name == "round-00003-Zürich.safetensors"
    arrays, about = read(tmp_path / name)
    assert arrays == {"delta/a": b"\x80\x04N.", "delta/b": b""}
    assert (about["organization"], about["round"], about["reason"]) == ("Zürich", 3, "it cannot be read")
    assert about["sha256"] == hashlib.sha256(b"delta/a\x80\x04N.delta/b").hexdigest()
    assert about["arrays"] == ["delta/a: float32 (4,) numpy.ndarray", "delta/b: float32 (0,) numpy.ndarray"]
    records = about["records"]
    assert isinstance(records, dict)
    assert records["noise"] == {"a": "1.5"}
    assert len(records["update"]["organization"]) == 200
    assert {key: records["update"][key] for key in ("round", "raw", "list")} == {
        "round": "3",
        "raw": "b'\\x00'",
        "list": "[1, 2]",
    }


def test_names_count_like_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept too: a file must not grow by a hundred thousand empty arrays."""
    monkeypatch.setattr(quarantine, "_MAX_BYTES", 300)
    folder = Quarantine(tmp_path)
    assert read(tmp_path / folder.keep(message(a=b"", b=b""), "a", 1, "no"))[0]
    assert not read(tmp_path / folder.keep(message(**{150 * "a": b"", 150 * "b": b""}), "a", 2, "no"))[0]
    monkeypatch.setattr(quarantine, "_MAX_ARRAYS", 1)
    assert not read(tmp_path / folder.keep(message(a=b"", b=b""), "a", 3, "no"))[0]


def test_of_what_is_too_large_the_description_alone_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_MAX_BYTES", 9 + len("delta/adelta/b"))
    for data, kept in ((b"12345", {"delta/a": b"12345", "delta/b": b"1234"}), (b"123456", {})):
        arrays, about = read(tmp_path / Quarantine(tmp_path).keep(message(a=data, b=b"1234"), "a", 1, "x"))
        assert arrays == kept
        assert about["bytes"] == len(data) + 4


def test_of_each_organization_the_last_ten_stay(tmp_path: Path) -> None:
    kept = Quarantine(tmp_path)
    for round in range(1, 13):
        kept.keep(message(a=b"1"), "[a]", round, "x")
    kept.keep(message(a=b"1"), "b-[a]", 1, "x")
    expected = [f"round-{round:05d}-[a].safetensors" for round in range(3, 13)]
    assert files(tmp_path) == sorted([*expected, "round-00001-b-[a].safetensors"])
