from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.errors import RunError
from cotune.server.rounds.buffers import ReorderBuffer, SpillBuffer
from cotune.strategies.types import Update
from tests.support.unreliable_grid import files

ORDER = ("c", "a", "d", "b")


def update(name: str) -> Update:
    return Update(name, 1, {"w": torch.tensor([float(ord(name))])}, examples=1, steps=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(came=st.permutations(ORDER), silent=st.sets(st.sampled_from(ORDER)), never=st.sets(st.sampled_from(ORDER)))
def test_updates_come_out_in_the_order_of_the_organizations(
    tmp_path: Path, came: list[str], silent: set[str], never: set[str]
) -> None:
    turns = ReorderBuffer(ORDER, SpillBuffer(tmp_path / "inbox"))
    out = []
    for name in came:
        if name not in never:
            out += list(turns.settle(name, None if name in silent else update(name)))
    out += list(turns.rest())
    assert [one.organization for one in out] == [name for name in ORDER if name not in silent | never]
    assert all(float(one.delta["w"]) == ord(one.organization) for one in out)
    assert files(tmp_path / "inbox") == []


def test_in_their_order_nothing_touches_the_disk(tmp_path: Path) -> None:
    turns = ReorderBuffer(ORDER, SpillBuffer(tmp_path / "inbox"))
    for name in ORDER:
        [one] = turns.settle(name, update(name))
        assert one.organization == name
    assert not (tmp_path / "inbox").exists()


def test_what_a_crash_left_is_removed_and_a_damaged_file_is_a_run_error(tmp_path: Path) -> None:
    SpillBuffer(tmp_path).put(3, update("a"))
    inbox = SpillBuffer(tmp_path)
    assert files(tmp_path) == []
    inbox.put(3, update("a"))
    (tmp_path / "00003.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"00003\.safetensors cannot be read .*resume the run"):
        inbox.take(3)
