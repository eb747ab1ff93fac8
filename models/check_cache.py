"""Cache features, and results of checks that take seconds, between runs in the user's cache folder.

A result is stored only if a check has passed, under a key of everything on which it depends. An entry that is damaged, belongs to
another check, or was written by another user is ignored, and the check is repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.models.device import kernel_key
from cotune.storage.files import atomic_write

if TYPE_CHECKING:
    from cotune.models.trainable import TrainableModel

_PACKAGES = ("cotune", "torch", "transformers", "tokenizers", "opacus", "peft", "bitsandbytes")
_FOLDERS = ("data/inputs", "data/tasks", "models", "privacy/mechanisms", "client/training")  # whose code is what a check is about
_FORMAT = 1


def cache_folder() -> Path:
    """Return the folder that is kept between runs: $COTUNE_CACHE, or cotune/ in the user's cache folder.

    For a user without a home, a folder of that user alone among the temporary files.
    """
    given = os.environ.get("COTUNE_CACHE")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotune"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cotune-{os.getuid()}"


def model_key(model: TrainableModel) -> tuple[object, ...]:
    """Return what decides the numbers of an unchanged model, before any training.

    The files of the base model, its head and adapters, the code of cotune and of the libraries, and what chooses kernels here.
    """
    loaded = model.loaded
    drawn = (model.seed, len(loaded.module.config.id2label), model.lora.model_dump_json() if model.lora else "")
    task = loaded.task
    how = (
        type(task).__name__,
        task.pipeline,
        task.described,
        getattr(task, "max_target", None),
        loaded.frozen,
        loaded.max_length,
        *loaded.feature,
    )
    return (loaded.folder.content_hash, *drawn, *how, _versions(), _code_digest(), kernel_key(model.device))


def read_check(check: str, key: Sequence[object]) -> float | None:
    """Return the result of a check that has passed under this key; None where it is not known.

    Args:
        check: Name of the check, which is the name of its folder.
        key: All that decides the result; compared by its `repr`.
    """
    file = _file(check, key)
    try:
        if not is_own(file):
            return None
        entry = json.loads(file.read_bytes())
        result = float(entry["result"])
        return result if (entry["format"], entry["key"]) == (_FORMAT, repr(tuple(key))) and math.isfinite(result) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_check(check: str, key: Sequence[object], result: float) -> None:
    """Store the result of a check that has passed; if it cannot be written, the check is repeated the next time.

    Args:
        check: Name of the check.
        key: Everything on which the result depends.
        result: Of the check.
    """
    entry = {"format": _FORMAT, "key": repr(tuple(key)), "result": result}
    with contextlib.suppress(OSError):
        atomic_write(_file(check, key), json.dumps(entry).encode())


def _file(check: str, key: Sequence[object]) -> Path:
    return cache_folder() / "checks" / check / f"{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()}.json"


def is_own(file: Path) -> bool:
    """Return whether nobody but this user and root can have written a file of the cache, or put it into its folder.

    Raises:
        OSError: It is not there.
    """
    states = (file.parent.stat(), file.stat())
    return all(s.st_uid in (os.geteuid(), 0) and not s.st_mode & (stat.S_IWGRP | stat.S_IWOTH) for s in states)


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    return tuple(f"{name} {_version(name)}" for name in _PACKAGES)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """SHA-256 over the source that computes and checks: a checkout changes without a new version."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for file in sorted(file for folder in _FOLDERS for file in (root / folder).rglob("*.py")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
