"""An update as a file: safetensors, with everything that is not a tensor as JSON in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cotune.models.trainable import strip_prefix
from cotune.storage.json_documents import parse_json
from cotune.strategies.types import Update


def update_bytes(update: Update, **about: str) -> bytes:
    """Return the content of an update's file.

    Args:
        update: The update.
        **about: Further entries of the metadata, such as the plan of the update.
    """
    plain = {f.name: getattr(update, f.name) for f in fields(update) if f.name not in ("delta", "statistics")}
    tensors = {f"delta/{n}": t for n, t in update.delta.items()} | {f"statistics/{n}": t for n, t in update.statistics.items()}
    content: bytes = save({n: t.contiguous() for n, t in tensors.items()}, metadata={"update": json.dumps(plain | about)})
    return content


def round_of(file: Path, plan_id: str) -> int | None:
    """Return the round of the update in a file; None if there is no file, or its update belongs to another plan.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with _opened(file) as (_, about):
            return int(about["round"]) if about["plan_id"] == plan_id else None
    except FileNotFoundError:
        return None


def read_update(file: Path, **expected: Any) -> Update | None:
    """Read an update.

    Args:
        file: The file.
        **expected: Entries that the metadata must have.

    Returns:
        The update; None if the metadata differs from what is expected.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is damaged.
    """
    with _opened(file) as (tensors, about):
        if any(about[name] != value for name, value in expected.items()):
            return None
        plain = {f.name: about[f.name] for f in fields(Update) if f.name not in ("delta", "statistics")}
        found: dict[str, Tensor] = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        return Update(delta=strip_prefix("delta/", found), statistics=strip_prefix("statistics/", found), **plain)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """Open an update's file, and yield its tensors and metadata; raises as `read_update` does, also inside the block."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors, parse_json(tensors.metadata()["update"])
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(str(error)) from None
