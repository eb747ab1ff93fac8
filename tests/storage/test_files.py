"""Files and locks under crashes: what a killed process held is free, and what it was writing is whole."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cotune.storage.files import atomic_write, exclusive_lock, is_locked, remove_parts
from tests.support.failures import fails_with

HOLDER = """
import sys
from pathlib import Path
from cotune.storage.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "held"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.crash
def test_lock_is_released_by_kill(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_locked(file)
        with fails_with("run.locked", "hospital-a") as error, exclusive_lock(file, "hospital-a has it"):
            pytest.fail("the lock was given twice")
        assert error.value.code == "run.locked"
        holder.kill()
        holder.wait()
    assert not is_locked(file)
    with exclusive_lock(file, "hospital-a has it"):
        assert is_locked(file)


def test_lock_without_holder_waits(tmp_path: Path) -> None:
    order = []
    taken = threading.Event()
    free = threading.Event()

    def hold() -> None:
        with exclusive_lock(tmp_path / "lock"):
            taken.set()
            free.wait()
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    threading.Timer(0.05, free.set).start()
    with exclusive_lock(tmp_path / "lock"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_lock_waits_as_long_as_the_timeout(tmp_path: Path) -> None:
    taken = threading.Event()
    free = threading.Event()

    def hold() -> None:
        with exclusive_lock(tmp_path / "lock"):
            taken.set()
            free.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    threading.Timer(0.05, free.set).start()
    with exclusive_lock(tmp_path / "lock", "held", timeout=60.0):
        assert free.is_set()
    thread.join()


def test_lock_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with fails_with("run.not_writable", "gone"), exclusive_lock(tmp_path / "gone" / "lock", "held"):
        pytest.fail("there is no folder")


def test_missing_lock_file_is_not_created(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []


def test_lock_ends_with_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="problem"), exclusive_lock(tmp_path / "lock", "held"):
        raise ValueError("problem")
    assert not is_locked(tmp_path / "lock")


def test_lock_file_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("something")
    with exclusive_lock(tmp_path / "lock", "held"):
        pass
    assert (tmp_path / "lock").read_text() == "something"


def test_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    file = tmp_path / "document"
    atomic_write(file, b"former")
    with pytest.raises(TypeError):
        atomic_write(file, "text")  # type: ignore[arg-type]
    assert file.read_bytes() == b"former"
    assert [each.name for each in tmp_path.iterdir()] == ["document"]


@pytest.mark.parametrize("renamed", [True, False])
def test_an_interruption_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool) -> None:
    """Ctrl-C just after the renaming had become the failure to remove what was renamed: a simulation took it for that of an
    organization, and went on."""
    replace = os.replace

    def interrupted(old: str, new: Path) -> None:
        if renamed:
            replace(old, new)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == (["file"] if renamed else [])


def test_parts_of_killed_writers_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "document"
    atomic_write(file, b"whole")
    (tmp_path / ".document.abc.part").write_bytes(b"who")
    (tmp_path / ".another.abc.part").write_bytes(b"an")
    remove_parts(file)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".another.abc.part", "document"]
