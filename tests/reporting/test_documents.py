"""Documents of a run: read from any version, and written again without a loss."""

from __future__ import annotations

import json
import math

import pytest

from cotune.reporting.documents.base import Document
from cotune.reporting.documents.events import OtherEvent, RoundFinished, UpdateDropped, known_events, parse_event
from cotune.reporting.documents.rounds import RoundEntry
from cotune.reporting.documents.summary import RunSummary
from tests.support.summaries import empty_summary

OLD = {"round": 1, "stage": "head", "metrics": None, "epsilon": {"a": 1.5}, "participants": ["a"], "dropped": []}


def test_document_keeps_unknown_and_absent_keys() -> None:
    entry = RoundEntry.model_validate({**OLD, "of a later version": [1]})
    assert entry.as_json() == {**OLD, "of a later version": [1]}
    assert (entry.applied, entry.weights, entry.absent) == (True, {}, [])
    assert "weights" not in entry


def test_document_reads_like_the_parsed_file() -> None:
    entry = RoundEntry.model_validate(OLD)
    assert entry["participants"] == entry.get("participants") == ["a"]
    assert entry == OLD
    assert dict(entry) == OLD
    assert entry.get("weights", {}) == {}
    with pytest.raises(KeyError):
        entry["weights"]


def test_integer_larger_than_any_float_is_infinite() -> None:
    """Old runs kept whatever an organization stated."""
    entry = RoundEntry.model_validate(json.loads(json.dumps({**OLD, "epsilon": {"a": 10**400}})))
    assert entry.epsilon["a"] == math.inf


def test_half_a_character_survives() -> None:
    line = {"event": "update_dropped", "round": 1, "organization": "a\ud800", "reason": "\udfff"}
    assert parse_event(line).as_json() == line


def test_event_is_told_apart_by_its_name() -> None:
    assert isinstance(parse_event({"event": "round_finished", **OLD}), RoundFinished)
    assert isinstance(parse_event({"event": "update_dropped", "round": 1, "organization": "a", "reason": "b"}), UpdateDropped)


@pytest.mark.parametrize("fields", [{"event": "of a later version", "x": 1}, {"event": "update_dropped", "round": "one"}])
def test_event_of_another_version_is_kept_as_it_is(fields: dict[str, object]) -> None:
    found = parse_event(dict(fields))
    assert isinstance(found, OtherEvent)
    assert found.as_json() == fields


def test_every_event_has_a_name_of_its_own() -> None:
    names = [model.model_fields["event"].default for model in known_events()]
    assert len(set(names)) == len(names) >= 30


def test_summary_is_written_as_it_was_read() -> None:
    table = empty_summary().as_json()
    assert table["schema"] == 1
    assert "data" not in table  # as in every real run
    assert RunSummary.model_validate(table).as_json() == table


def test_document_cannot_be_changed() -> None:
    class Size(Document):
        up: int

    with pytest.raises(ValueError, match="frozen"):
        Size(up=1).up = 2  # type: ignore[misc]
