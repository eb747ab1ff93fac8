"""JSON documents: what fits is read, what does not is refused with advice, and a failed write changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from pydantic import BaseModel, ConfigDict, field_validator

from cotune.errors import RunError
from cotune.storage.json_documents import JsonDocument
from tests.support.failures import fails_with


class Note(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    words: str
    count: int = 0

    @field_validator("words")
    @classmethod
    def _known(cls, value: str) -> str:
        if value == "unsupported":
            raise UnsupportedAlgorithm("of a library")
        return value


def document(folder: Path) -> JsonDocument[Note]:
    return JsonDocument(folder / "deep" / "note.json", Note, advice="write it again")


def test_document_is_read_as_written(tmp_path: Path) -> None:
    note = Note(words="für 東京 \u2028", count=3)
    document(tmp_path).write(note)
    assert document(tmp_path).read() == note
    assert (tmp_path / "deep" / "note.json").stat().st_mode & 0o777 == 0o600


def test_missing_document_is_none(tmp_path: Path) -> None:
    assert document(tmp_path).read() is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"null", b'{"words": 1}', b'{"words": "a", "more": 1}', b"[" * 100_000, b'{"words": "unsupported"}'],
    ids=["empty", "cut off", "no Unicode", "null", "wrong type", "unknown key", "deep", "validator"],
)
def test_damaged_document_is_refused_with_advice(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "deep" / "note.json"
    file.parent.mkdir()
    file.write_bytes(content)
    with fails_with("run.damaged_document", "note.json") as error:
        document(tmp_path).read()
    assert error.value.code == "run.damaged_document"
    assert file.read_bytes() == content


def test_folder_in_place_of_a_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep" / "note.json").mkdir(parents=True)
    with pytest.raises(RunError) as error:
        document(tmp_path).read()
    assert error.value.code == "run.damaged_document"


def test_failed_write_keeps_the_former_document(tmp_path: Path) -> None:
    document(tmp_path).write(Note(words="former"))
    (tmp_path / "deep").chmod(0o500)
    try:
        try:
            document(tmp_path).write(Note(words="new"))
        except OSError:
            expected = "former"
        else:  # for root, permissions keep nothing from being written
            expected = "new"
    finally:
        (tmp_path / "deep").chmod(0o700)
    read = document(tmp_path).read()
    assert read is not None
    assert read.words == expected


def test_document_of_a_plain_type(tmp_path: Path) -> None:
    strikes = JsonDocument(tmp_path / "strikes.json", dict[str, int])
    strikes.write({"a": 2})
    assert strikes.read() == {"a": 2}
