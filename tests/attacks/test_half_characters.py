"""Names that JSON can write and no file can hold, in what a member answers.

Flower writes the names of records and arrays, and the type of an array, as JSON, which can say half a character (U+D800). On commit
15d5778 one such name, or such words in a refusal that the member had signed, ended the process that plays the run (UnicodeEncodeError)
before anybody was named, and every `--resume` after it: one member stopped a run for good.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from cotune.flower.chunks import ChunkedMessage, Malformed
from cotune.server.runs.events import Events, read_events
from tests.support.events import make_event
from tests.support.organizations import adding
from tests.support.rounds import play
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import real, told, wild

NAMES = ("org-1", "org-2", "org-3")
HALF = "w\ud800"


def zeros() -> Array:
    return Array(np.zeros(3, np.float32))


def changed(**fields: object) -> Array:
    array = zeros()
    for name, value in fields.items():
        setattr(array, name, value)
    return array


def record(content: RecordDict) -> None:
    content[HALF] = ArrayRecord({"w": zeros()})


def array(content: RecordDict) -> None:
    content["delta"] = ArrayRecord({HALF: zeros()})


def value(content: RecordDict) -> None:
    content["disclosures"] = ConfigRecord({HALF: 1.0})


def dtype_of_half(content: RecordDict) -> None:
    content["delta"] = ArrayRecord({"w": changed(dtype=HALF)})


@pytest.mark.parametrize("change", [record, array, value, dtype_of_half])
def test_the_run_goes_on_and_names_the_sender(new_run: NewRun, change: Callable[[RecordDict], None]) -> None:
    folder = real(new_run(*NAMES, rounds=2))
    grid = wild(folder, {name: adding(1.0) for name in NAMES})
    answer = grid.answer

    def answered(message: Message) -> Message:
        reply = answer(message)
        if grid._name(message) == "org-3":
            change(reply.content)
        return reply

    grid.answer = answered  # type: ignore[method-assign]
    progress = play(folder, grid)
    assert [entry["participants"] for entry in progress.history] == [["org-1", "org-2"]] * 2
    assert [entry["quarantined"] for entry in progress.history] == [["org-3"]] * 2
    assert len(told(folder, "update_quarantined")) == 2


@pytest.mark.parametrize("change", [record, array, dtype_of_half])
def test_it_is_no_message_where_it_is_put_together(change: Callable[[RecordDict], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides, before anything else is done with it."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    content = RecordDict({"update": ConfigRecord({"round": 1})})
    change(content)
    message = Message(content, 2, "train")
    pieces = {number: part.deflate() for number, part in get_all_nested_objects(message).items()}
    with pytest.raises(Malformed):
        ChunkedMessage(message.object_id, pieces).message(2**20)


def test_an_honest_message_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    content = RecordDict({"delta": ArrayRecord({"größe/雪": zeros(), "empty": Array(np.zeros((0, 2), np.float32))})})
    message = Message(content, 2, "train")
    pieces = {number: part.deflate() for number, part in get_all_nested_objects(message).items()}
    assert ChunkedMessage(message.object_id, pieces).message(2**20).content == content


def test_surrogate_characters_are_logged_as_signed(tmp_path: Path) -> None:
    """A refusal is signed over its words, which the trail keeps."""
    events = Events(tmp_path / "trail.jsonl", silent=True)
    events.write(make_event("reply", words=HALF))
    assert read_events(events.path)[0]["words"] == HALF
