"""Where updates wait or stay: those before their turn, those after their round, and those that were refused.

Answers that come after their round: with server.late = fold they enter a later one, with less weight; else they are shown.

Which rounds can be answered late is kept in memory alone: after a restart their answers are ignored.

Updates that were refused, kept as they came for a person to look at: nothing in them is decoded or executed.

quarantine/round-00003-<organization>.safetensors    every array's bytes as uint8; all else as JSON in the metadata
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from safetensors.numpy import save

from cotune.errors import RunError
from cotune.plan.tables import RoundsConfig
from cotune.protocol.update_file import read_update, update_bytes
from cotune.server.rounds.update_validation import Verify
from cotune.storage.files import atomic_write
from cotune.strategies.types import Update


class SpillBuffer:
    """A folder that holds nothing beyond a round: what a crash left there is removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clear()

    def put(self, number: int, update: Update) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(number).write_bytes(update_bytes(update))  # not durable: after a crash it is asked for again

    def take(self, number: int) -> Update:
        """Raises RunError when the file is not as it was written."""
        file = self._file(number)
        try:
            update = read_update(file)
        except (FileNotFoundError, ValueError) as error:
            raise RunError(f"{file} cannot be read ({error}): expected the update that was put there; resume the run") from None
        assert update is not None
        file.unlink()
        return update

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


class ReorderBuffer:
    """Gives updates back in the order of the organizations, no matter who came first: each as soon as all before it are
    settled."""

    def __init__(self, order: Sequence[str], inbox: SpillBuffer) -> None:
        self._number = {name: i for i, name in enumerate(order)}
        self._inbox = inbox
        self._next = 0
        self._settled: dict[int, bool] = {}  # who is done before their turn -> whether an update was put aside

    def settle(self, name: str, update: Update | None) -> Iterator[Update]:
        """What can be added now that this organization has sent an update, or will send none."""
        number = self._number[name]
        if number != self._next:
            self._settled[number] = update is not None
            if update is not None:
                self._inbox.put(number, update)
            return
        self._next += 1
        if update is not None:
            yield update
            del update
        while self._next in self._settled:
            yield from self._aside(self._next)
            self._next += 1

    def rest(self) -> Iterator[Update]:
        """What is still put aside, as the others will not come."""
        for number in sorted(self._settled):
            yield from self._aside(number)

    def _aside(self, number: int) -> Iterator[Update]:
        if self._settled.pop(number):
            yield self._inbox.take(number)


Late = tuple[int, str]  # the round that the update is for, and the organization


class Lateness:
    """Of one run. inbox: where late updates wait for the end of the round in which they came."""

    def __init__(self, config: RoundsConfig, inbox: SpillBuffer) -> None:
        self._staleness = config.max_staleness if config.late == "fold" else 0
        self._inbox = inbox
        self._open: dict[int, Verify] = {}
        self._came: list[Late] = []

    def open(self, round: int, verify: Verify) -> None:
        """Late answers of this round, which is played now, will be held to this."""
        if self._staleness:
            self._open[round] = verify
        self._open = {number: held for number, held in self._open.items() if number >= round - self._staleness}

    def verify_of(self, round: int) -> Verify | None:
        """What an answer of an earlier round is held to; None where it comes too late."""
        return self._open.get(round)

    def oldest(self, round: int) -> int:
        """The last round whose answers nobody waits for after `round`."""
        return round - self._staleness

    def put(self, update: Update) -> None:
        self._inbox.put(len(self._came), update)
        self._came.append((update.round, update.organization))

    def take(self, order: Sequence[str]) -> Iterator[Update]:
        """The late updates, by round and organization, no matter who came first."""
        came = self._came
        self._came = []
        for number in sorted(range(len(came)), key=lambda i: (came[i][0], order.index(came[i][1]))):
            yield self._inbox.take(number)


_MOST_BYTES = 64 * 2**20  # of the arrays of one update; of a larger one only the description is kept
_MOST_ARRAYS = 100_000  # likewise: their names are a part of the file
_MAX_FILES = 10  # of one organization; the oldest go
_MOST_TEXT = 200  # characters of a name or a value in a header
_MOST_ENTRIES = 1000  # in a description


class Quarantine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, content: RecordDict, organization: str, round: int, reason: str) -> str:
        """Keeps a message, durably. Returns the name of its file."""
        arrays = {
            f"{key[:_MOST_TEXT]}/{name[:_MOST_TEXT]}": array.data
            for key, record in content.items()
            if isinstance(record, ArrayRecord)
            for name, array in record.items()
        }
        size = sum(len(data) for data in arrays.values())
        about = {
            "organization": organization,
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
        file = self.folder / f"round-{round:05d}-{organization}.safetensors"
        atomic_write(file, save(tensors, metadata={"quarantine": json.dumps(about, ensure_ascii=False)}))
        for older in sorted(self.folder.glob(f"round-?????-{glob.escape(organization)}.safetensors"))[:-_MAX_FILES]:
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
