"""Write files atomically, and lock them for one process at a time.

The operating system releases a lock when its process ends, in whatever way, so that nothing needs cleaning up after `kill -9`.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from cotune.errors import RunError

_DRAWN = secrets.token_hex(4)  # no name of a temporary file is one that an earlier process of this number has left behind
_numbers = itertools.count()
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # which follows no link, and is inherited by no process


def atomic_write(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file atomically.

    The content is written to a temporary file (mode 0600) in the same folder, synchronized to the disk, and renamed: other
    processes see either the old file or the new one, never a part. Missing folders are created.

    Args:
        path: The file.
        content: All of it.
        durable: Whether it must survive a power failure; if not, it only survives the end of the process.

    Raises:
        OSError: If the file cannot be written; an old one is unchanged.
    """
    part = f"{path.parent}/.{path.name}.{os.getpid()}-{_DRAWN}-{next(_numbers)}.part"
    try:
        descriptor = os.open(part, _NEW_FILE, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, _NEW_FILE, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):  # it has its name already: then nothing may take the place of an interruption
            os.unlink(part)
        raise
    if durable:
        sync(path.parent)


def remove_parts(path: Path) -> None:
    """Remove the temporary files that killed processes left behind while they wrote `path`.

    Only for a file that no other process is writing at the moment.
    """
    try:
        names = os.listdir(path.parent)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(f".{path.name}.") and name.endswith(".part"):
            (path.parent / name).unlink(missing_ok=True)


def sync(path: Path | str) -> None:
    """Synchronize an existing file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_POLL_SECONDS = 0.02


@contextmanager
def exclusive_lock(file: Path, holder: str = "", *, timeout: float = 0.0) -> Iterator[None]:
    """Keep other processes and threads out of the block.

    Args:
        file: The lock file, which is created (mode 0600) and left in place. It holds nothing.
        holder: What the error says when the lock is held: who holds it, and what to do. Without it, wait as long as it takes.
        timeout: Seconds to wait before the error, for a lock that others hold for a moment only.

    Raises:
        RunError: The lock is held (`run.locked`), or the file cannot be written (`run.not_writable`).
    """
    lock = FileLock(file, mode=0o600)
    try:
        file.parent.stat()  # filelock would create the folder
        lock.acquire(timeout=timeout if holder else -1, poll_interval=_POLL_SECONDS)
    except Timeout:
        raise RunError(holder, code="run.locked") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or "its file system has no locks"
        raise RunError(
            f"{file.parent} cannot be written ({reason}): free space for it, or correct its permissions", code="run.not_writable"
        ) from None
    try:
        if isinstance(lock, SoftFileLock):  # what filelock falls back to; it would outlive a process that is killed
            raise RunError(
                f"the file system of {file.parent} has no locks: expected one with them; choose another folder",
                code="run.no_locks",
            )
        yield
    finally:
        lock.release()


def is_locked(file: Path) -> bool:
    """Return whether somebody holds the lock of a file; one that is not there is held by nobody, and is not created."""
    if not file.exists():
        return False
    try:
        with exclusive_lock(file, "held"):
            return False
    except RunError:
        return True
