"""Folders of image files: a folder for each class, and, one level up, a folder for each organisation."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cotune.models.errors import DataError
from cotune.models.images import SUFFIXES


def labelled_images(folder: Path) -> list[tuple[Path, str]]:
    """(file, class) of every image in the folder's sub-folders, which are named for their classes; sorted. Raises DataError."""
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return [(file, path.name) for path in classes for file in sorted(path.iterdir()) if _is_image(file)]
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be opened ({error.strerror}): check its permissions") from error


def holds_classes(folder: Path) -> bool:
    """Whether the folder is one organisation's: its sub-folders hold images."""
    return folder.is_dir() and bool(labelled_images(folder))


def signature(folder: Path) -> int:
    """A number that changes when an image is added, removed, renamed or written anew."""
    digest = hashlib.sha256()
    for file, _ in labelled_images(folder):
        status = file.stat()
        digest.update(f"{file}\n{status.st_size}\n{status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
