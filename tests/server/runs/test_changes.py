"""What a run's newest rounds have changed, as files on which nothing but the size of requests depends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cotune.plan.wire import Codec
from cotune.protocol.changes import MAX_CHANGES, add_change, count_cost
from cotune.protocol.codecs import round_to, rounding_generator
from cotune.protocol.messages import state_digest
from cotune.server.runs.changes import ChangeFiles

State = dict[str, Tensor]


def play(files: ChangeFiles, state: State, rounds: range, codec: Codec = "int8", seed: int = 1) -> State:
    """Rounds that change w, and leave v as it is."""
    for number in rounds:
        values = torch.full_like(state["w"], float(seed + number))
        change = {"w": round_to(codec, values, rounding_generator(seed, "the server", number, "w"))}
        after = add_change(state, change)
        files.write(number, state, state, change, state_digest(after))
        state = after
    return state


def start(count: int = 4096) -> State:
    return {"w": torch.zeros(count), "v": torch.ones(3)}


@pytest.mark.parametrize(("codec", "most"), [("bfloat16", 2), ("int8", 3), ("int4", 7)])
def test_changes_go_back_as_far_as_they_save_bytes(tmp_path: Path, codec: Codec, most: int) -> None:
    files = ChangeFiles(tmp_path, codec)
    begun = start(2**16)
    state = play(files, begun, range(1, 11), codec)
    found = files.read_before(11, state)
    assert [change.round for change in found] == list(range(11 - len(found), 11))
    assert most - 1 <= len(found) <= most
    assert {change.names for change in found} == {frozenset(begun)}
    built = add_change({"w": state["w"] - sum(change.values["w"] for change in found), "v": state["v"]}, {})
    for change in found:
        assert change.start == state_digest(built)
        built = add_change(built, change.values)
    assert state_digest(built) == state_digest(state)
    size = sum(file.stat().st_size for file in (tmp_path / "changes").iterdir())
    assert size <= count_cost(begun, "float32")  # never more on disk than one state


def test_rounds_that_change_nothing_are_counted_too(tmp_path: Path) -> None:
    files = ChangeFiles(tmp_path, "int8")
    state = start()
    for number in range(1, 2 * MAX_CHANGES):
        files.write(number, state, state, {}, state_digest(state))
    assert len(files.read_before(2 * MAX_CHANGES, state)) == MAX_CHANGES
    assert len(list((tmp_path / "changes").iterdir())) == MAX_CHANGES


def test_without_a_codec_there_are_none(tmp_path: Path) -> None:
    play(ChangeFiles(tmp_path, "int8"), start(), range(1, 3))
    assert ChangeFiles(tmp_path, "float32").read_before(3, start()) == []
    assert ChangeFiles(tmp_path / "gone", "int8").read_before(3, start()) == []


def test_a_round_that_was_played_again_ends_what_came_before_it(tmp_path: Path) -> None:
    """As after a checkpoint that was removed: the new round 3 does not begin with what the old round 2 has left."""
    files = ChangeFiles(tmp_path, "int8")
    begun = start(2**16)
    play(files, begun, range(1, 4))
    other = play(files, add_change(begun, {"w": torch.ones(2**16)}), range(3, 4), seed=9)
    assert [change.round for change in files.read_before(4, other)] == [3]
    assert files.read_before(4, begun) == []


@pytest.mark.parametrize(
    "wrong", [{"start": "no digest"}, {"shapes": {"w": [-1, -4096]}}, {"shapes": {"w": [2**70, 0]}}, {"round": 1}]
)
def test_a_header_that_no_round_writes_is_no_change(tmp_path: Path, wrong: dict[str, object]) -> None:
    """A request of it would be malformed, and cost organizations their round."""
    files = ChangeFiles(tmp_path, "int8")
    state = play(files, start(), range(1, 3))
    file = tmp_path / "changes" / "round-00002.safetensors"
    with safe_open(file, framework="pt") as found:
        tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        header = json.loads(found.metadata()["change"])
    file.write_bytes(save(tensors, metadata={"change": json.dumps({**header, **wrong})}))
    assert files.read_before(3, state) == []


@given(where=st.integers(0, 10**6), content=st.binary(max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_none_or_another_change(tmp_path: Path, where: int, content: bytes) -> None:
    """Never an error. What it changes then has another digest than the request names, which organizations notice."""
    files = ChangeFiles(tmp_path, "int8")
    state = play(files, start(64), range(1, 3))
    file = tmp_path / "changes" / "round-00002.safetensors"
    whole = file.read_bytes()
    at = where % len(whole)
    for damaged in (content, whole[:at], whole[:at] + content + whole[at + len(content) :]):
        file.write_bytes(damaged)
        for change in files.read_before(3, state):
            assert all(torch.isfinite(values).all() for values in change.values.values())


def test_a_file_of_another_name_stops_no_round(tmp_path: Path) -> None:
    files = ChangeFiles(tmp_path, "int8")
    state = play(files, start(), range(1, 2))
    stranger = tmp_path / "changes" / "round-1.safetensors"
    stranger.write_bytes(b"a copy")
    (tmp_path / "changes" / "round-7.safetensors").write_bytes(b"")  # of no round that has a file
    (tmp_path / "changes" / "round-00009.safetensors").mkdir()
    state = play(files, state, range(2, 4))
    assert [change.round for change in files.read_before(4, state)] == [1, 2, 3]
    assert stranger.exists()
