from __future__ import annotations

import weakref
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.server.rounds.updates.buffers import ReorderBuffer, SpillBuffer
from cotune.strategies.types import Update
from tests.support.failures import fails_with
from tests.support.unreliable_grid import files

ORDER = ("c", "a", "d", "b")


def update(name: str) -> Update:
    return Update(name, 1, {"w": torch.tensor([float(ord(name))])}, examples=1, steps=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(came=st.permutations(ORDER), silent=st.sets(st.sampled_from(ORDER)), never=st.sets(st.sampled_from(ORDER)))
def test_updates_come_out_in_the_order_of_the_organizations(
    tmp_path: Path, came: list[str], silent: set[str], never: set[str]
) -> None:
    out = list[Update]()
    turns = ReorderBuffer(ORDER, SpillBuffer(tmp_path / "inbox"), out.append)
    for name in came:
        if name not in never:
            turns.put(name, None if name in silent else update(name))
            turns.drain()
    turns.drain_all()
    assert [one.organization for one in out] == [name for name in ORDER if name not in silent | never]
    assert all(float(one.delta["w"]) == ord(one.organization) for one in out)
    assert files(tmp_path / "inbox") == []


def test_in_their_order_nothing_touches_the_disk(tmp_path: Path) -> None:
    out = list[Update]()
    turns = ReorderBuffer(ORDER, SpillBuffer(tmp_path / "inbox"), out.append)
    for name in ORDER:
        turns.put(name, update(name))
        assert out[-1].organization == name
        turns.drain()
    assert not (tmp_path / "inbox").exists()


def test_spill_buffer_removes_leftovers_and_names_damaged_files(tmp_path: Path) -> None:
    SpillBuffer(tmp_path).put(3, update("a"))
    inbox = SpillBuffer(tmp_path)
    assert files(tmp_path) == []
    inbox.put(3, update("a"))
    (tmp_path / "00003.safetensors").write_bytes(b"")
    with fails_with("run.damaged_document", "00003.safetensors"):
        inbox.take(3)


def test_no_update_is_held_once_it_was_passed_on(tmp_path: Path) -> None:
    """The largest objects of a round: one of them is in memory at a time, in whatever order they came."""
    alive = list[weakref.ref[Update]]()
    most = list[int]()

    def sink(passed: Update) -> None:
        alive.append(weakref.ref(passed))
        most.append(sum(each() is not None for each in alive))

    turns = ReorderBuffer(ORDER, SpillBuffer(tmp_path / "inbox"), sink)
    for name in reversed(ORDER):
        turns.put(name, update(name))
        turns.drain()
    assert most == [1, 1, 1, 1]
