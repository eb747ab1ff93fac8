from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.models.errors import ModelError
from cotune.models.model_settings import base_labels, read_settings


def labels(folder: Path, names: object) -> tuple[str, ...]:
    (folder / "config.json").write_text(json.dumps({"id2label": names}), encoding="utf-8")
    return base_labels(folder)


def test_labels_are_in_the_order_of_the_head(tmp_path: Path) -> None:
    assert labels(tmp_path, {"0": "negative", "1": "positive"}) == ("negative", "positive")
    eleven = {str(i): f"class {i}" for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    assert labels(tmp_path, eleven) == tuple(f"class {i}" for i in range(11))
    assert labels(tmp_path, {"0": "größer", "1": "kleiner"}) == ("größer", "kleiner")


@pytest.mark.parametrize("names", [{"0": "LABEL_0", "1": "LABEL_1"}, {}, None, []])
def test_generic_names_are_none(tmp_path: Path, names: object) -> None:
    assert labels(tmp_path, names) == ()


@pytest.mark.parametrize("names", [{"bad": 0, "good": 1}, ["bad", "good"], {"0": "bad", "2": "good"}, {"1": "bad"}, "bad"])
def test_other_names_are_refused(tmp_path: Path, names: object) -> None:
    with pytest.raises(ModelError):
        labels(tmp_path, names)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b"\xef\xbb\xbf{}", b'{"a": "\xe9"}', b"[" * 100_000, None])
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError):
        read_settings(tmp_path)
