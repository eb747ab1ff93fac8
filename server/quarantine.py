"""Updates that were refused, kept as they came for a person to look at: nothing in them is decoded or executed.

quarantine/round-00003-<organisation>.safetensors    every array's bytes as uint8; all else as JSON in the metadata
"""

from __future__ import annotations

import glob
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from safetensors.numpy import save

from cotune.models.durable import write_durably

_MOST_BYTES = 64 * 2**20  # of the arrays of one update; of a larger one only the description is kept
_MOST_ARRAYS = 100_000  # likewise: their names are a part of the file
_MOST_FILES = 10  # of one organisation; the oldest go
_MOST_TEXT = 200  # characters of a name or a value in a header
_MOST_ENTRIES = 1000  # in a description


class Quarantine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, content: RecordDict, organisation: str, round: int, reason: str) -> str:
        """Keeps a message, durably. Returns the name of its file."""
        arrays = {
            f"{key[:_MOST_TEXT]}/{name[:_MOST_TEXT]}": array.data
            for key, record in content.items()
            if isinstance(record, ArrayRecord)
            for name, array in record.items()
        }
        size = sum(len(data) for data in arrays.values())
        about = {
            "organisation": organisation,
            "round": round,
            "reason": reason,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "bytes": size,
            "sha256": _digest(arrays),
            "arrays": _headers(content),
            "records": {key[:_MOST_TEXT]: _words(r) for key, r in content.items() if not isinstance(r, ArrayRecord)},
        }
        kept = arrays if size + sum(map(len, arrays)) <= _MOST_BYTES and len(arrays) <= _MOST_ARRAYS else {}
        tensors = {name: np.frombuffer(data, np.uint8) for name, data in kept.items()}
        file = self.folder / f"round-{round:05d}-{organisation}.safetensors"
        write_durably(file, save(tensors, metadata={"quarantine": json.dumps(about, ensure_ascii=False)}))
        for older in sorted(self.folder.glob(f"round-?????-{glob.escape(organisation)}.safetensors"))[:-_MOST_FILES]:
            older.unlink(missing_ok=True)
        return file.name


def _digest(arrays: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name])
    return digest.hexdigest()


def _headers(content: RecordDict) -> list[str]:
    found = [
        f"{key[:_MOST_TEXT]}/{name[:_MOST_TEXT]}: {array.dtype[:40]} {tuple(array.shape[:8])} {array.stype[:40]}"
        for key, record in content.items()
        if isinstance(record, ArrayRecord)
        for name, array in record.items()
    ]
    return found[:_MOST_ENTRIES]


def _words(record: Any) -> dict[str, str]:
    return {name[:_MOST_TEXT]: f"{value!r:.{_MOST_TEXT}}" for name, value in list(record.items())[:_MOST_ENTRIES]}
