from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cotune.storage.files import atomic_write


def test_new_content_replaces_old(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file.json"
    for content in (b"old", b"new and longer", b""):
        atomic_write(file, content)
        assert file.read_bytes() == content
        assert list(file.parent.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    atomic_write(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_target_that_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        atomic_write(tmp_path / "file.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_the_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that a power cut asks for: contents, rename, folder."""
    order: list[str] = []
    fsync = os.fsync
    replace = os.replace

    def synced(descriptor: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "content")
        fsync(descriptor)

    def replaced(source: str, target: str) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    atomic_write(tmp_path / "file.json", b"content")
    assert order == ["content", "rename", "folder"]


WRITER = """
import os, signal, sys
from pathlib import Path
from cotune.storage.files import atomic_write

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(act):
    def acts(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            die()
        return act(*arguments, **options)
    return acts

file = Path(sys.argv[1])
left = int(sys.argv[2])
atomic_write(file, b"a" * 300_000)
for name in ("open", "fdopen", "fsync", "replace"):
    setattr(os, name, counted(getattr(os, name)))
atomic_write(file, b"b" * 700_000)
die()
"""


@pytest.mark.crash
def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    """Killed before the temporary file is made, opened, synchronized and renamed, before its folder is opened and synchronized, and after."""
    seen = []
    for moment in range(1, 8):
        file = tmp_path / f"{moment}.bin"
        done = subprocess.run([sys.executable, "-c", WRITER, str(file), str(moment)])
        assert done.returncode == -signal.SIGKILL
        content = file.read_bytes()
        assert content in (b"a" * 300_000, b"b" * 700_000)
        seen.append(content[:1])
    assert seen == [b"a"] * 4 + [b"b"] * 3
