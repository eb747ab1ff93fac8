"""Buffers for updates that arrived before their turn or after their round, and the quarantine of rejected ones.

Rejected updates are stored as received, for a person to inspect: nothing in them is decoded or executed.

quarantine/round-00003-<organization>.safetensors    every array's bytes as uint8; all else as JSON in the metadata
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from safetensors.numpy import save

from cotune.errors import RunError
from cotune.plan.server_config import RoundsConfig
from cotune.protocol.update_file import read_update, update_bytes
from cotune.server.rounds.updates.update_validation import UpdateSpec
from cotune.server.runs.run_folder import RunFolder
from cotune.storage.files import atomic_write
from cotune.strategies.types import Update


class SpillBuffer:
    """Updates on disk within one round, by number; remains of a crash are removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clear()

    def put(self, number: int, update: Update) -> None:
        """Write an update, not durably: after a crash it is requested again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(number).write_bytes(update_bytes(update))

    def take(self, number: int) -> Update:
        """Read an update and remove its file.

        Raises:
            RunError: If the file has changed since it was written.
        """
        file = self._file(number)
        try:
            update = read_update(file)
        except (FileNotFoundError, ValueError) as error:
            raise RunError(
                f"{file} cannot be read ({error}): expected the update that was put there; resume the run",
                code="run.damaged_document",
            ) from None
        assert update is not None
        file.unlink()
        return update

    def clear(self) -> None:
        """Remove all updates."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


Sink = Callable[[Update], None]
RoundOfUpdate = tuple[int, str]  # (the round that an update is for, its organization)


class ReorderBuffer:
    """Passes updates on in the order of the organizations, whatever the order of their arrival.

    An update is passed on as soon as all organizations before it are settled; until then it waits on disk. The buffer keeps no
    reference to an update that it has passed on.
    """

    def __init__(self, order: Sequence[str], spill: SpillBuffer, sink: Sink) -> None:
        """Create an empty buffer.

        Args:
            order: All organizations that may send an update.
            spill: Where updates before their turn wait.
            sink: Called with every update.
        """
        self._number = {name: i for i, name in enumerate(order)}
        self._spill = spill
        self._sink = sink
        self._next = 0
        # index of an organization whose update is not yet aggregated -> whether that update is on disk
        self._settled: dict[int, bool] = {}

    def put(self, name: str, update: Update | None) -> None:
        """Settle an organization: pass its update on if it is its turn, else write it to disk.

        Args:
            name: The organization.
            update: None if it will send none.
        """
        number = self._number[name]
        is_its_turn = number == self._next
        if is_its_turn:
            self._next += 1
        else:
            self._settled[number] = update is not None
        if update is not None and is_its_turn:
            self._sink(update)
        elif update is not None:
            self._spill.put(number, update)

    def drain(self) -> None:
        """Pass on the updates whose turn has come."""
        while self._next in self._settled:
            self._pass_on(self._next)
            self._next += 1

    def drain_all(self) -> None:
        """Pass on all updates; organizations that are not settled will send none."""
        for number in sorted(self._settled):
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._settled.pop(number):
            self._sink(self._spill.take(number))


class LateBuffer:
    """Updates that arrive after their round; with `server.late = "fold"` they enter a later one.

    Which rounds can still be answered is known only in memory: after a restart, late replies are ignored.
    """

    def __init__(self, config: RoundsConfig, spill: SpillBuffer) -> None:
        """Create an empty buffer; updates wait in `spill` until the end of the round in which they arrive."""
        self._staleness = config.max_staleness if config.late == "fold" else 0
        self._spill = spill
        self._specs: dict[int, UpdateSpec] = {}
        self._held: list[RoundOfUpdate] = []
        self._received: set[RoundOfUpdate] = set()

    def begin_round(self, spec: UpdateSpec) -> None:
        """Store the spec of a round that starts, for updates that arrive after it."""
        if self._staleness:
            self._specs[spec.round] = spec
        self._specs = {number: kept for number, kept in self._specs.items() if number >= spec.round - self._staleness}

    def end_round(self, round: int) -> int:
        """Drop specs of rounds that are too old, and return the last round whose replies are no longer used."""
        oldest = round - self._staleness
        self._received = {each for each in self._received if each[0] >= oldest}
        return oldest

    def spec_of(self, round: int) -> UpdateSpec | None:
        """Return the spec of updates of an earlier round; None if they are too late."""
        return self._specs.get(round)

    def note(self, round: int, organization: str) -> bool:
        """Record that an organization has replied to a round, and return whether this is its first reply."""
        is_new = (round, organization) not in self._received
        self._received.add((round, organization))
        return is_new

    def put(self, update: Update) -> None:
        """Write an update to disk."""
        self._spill.put(len(self._held), update)
        self._held.append((update.round, update.organization))

    def drain(self, order: Sequence[str], sink: Sink) -> None:
        """Pass on the updates, sorted by round and organization.

        Args:
            order: All organizations.
            sink: Called with every update.
        """
        held = self._held
        self._held = []
        for number in sorted(range(len(held)), key=lambda i: (held[i][0], order.index(held[i][1]))):
            sink(self._spill.take(number))


_MAX_BYTES = 64 * 2**20  # of the arrays of one update; of a larger one, only the description is stored
_MAX_ARRAYS = 100_000  # likewise, as their names are a part of the file
_MAX_FILES = 10  # per organization; the oldest are removed
_MAX_TEXT_LENGTH = 200  # characters of a name or a value in a header
_MAX_ENTRIES = 1000  # in a description


class Quarantine:
    """A folder of rejected updates, the last ten of each organization."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, content: RecordDict, organization: str, round: int, reason: str) -> str:
        """Store a rejected message durably.

        Args:
            content: The message as received.
            organization: Who sent it.
            round: The round that it is for.
            reason: Why it was rejected.

        Returns:
            The name of the file.
        """
        arrays = {
            f"{key[:_MAX_TEXT_LENGTH]}/{name[:_MAX_TEXT_LENGTH]}": array.data
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
            "records": {key[:_MAX_TEXT_LENGTH]: _texts(r) for key, r in content.items() if not isinstance(r, ArrayRecord)},
        }
        kept = arrays if size + sum(map(len, arrays)) <= _MAX_BYTES and len(arrays) <= _MAX_ARRAYS else {}
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
        f"{key[:_MAX_TEXT_LENGTH]}/{name[:_MAX_TEXT_LENGTH]}: {array.dtype[:40]} {tuple(array.shape[:8])} {array.stype[:40]}"
        for key, record in content.items()
        if isinstance(record, ArrayRecord)
        for name, array in record.items()
    ]
    return found[:_MAX_ENTRIES]


def _texts(record: Any) -> dict[str, str]:
    return {name[:_MAX_TEXT_LENGTH]: f"{value!r:.{_MAX_TEXT_LENGTH}}" for name, value in list(record.items())[:_MAX_ENTRIES]}


@dataclass(frozen=True)
class UpdateStore:
    """All buffers of a run.

    Attributes:
        inbox: Updates of the current round before their turn.
        late: Updates of earlier rounds.
        quarantine: Rejected updates.
        folder: For updates that a rule compares; see `strategies.update_store`.
    """

    inbox: SpillBuffer
    late: LateBuffer
    quarantine: Quarantine
    folder: Path

    @classmethod
    def open(cls, folder: RunFolder) -> UpdateStore:
        """Open the store of a run; inbox/ is emptied."""
        inbox = SpillBuffer(folder.path / "inbox")
        late = LateBuffer(folder.plan.server, SpillBuffer(folder.path / "inbox" / "late"))
        return cls(inbox, late, Quarantine(folder.path / "quarantine"), inbox.folder)
