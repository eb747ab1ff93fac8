"""The changes of a run's newest rounds, one file for each: changes/round-00001.safetensors in the folder of the run.

A file is written before the checkpoint of its round. Only the size of requests depends on it: where one is missing, damaged, or
ends with another state than the next one begins with, organizations are sent the whole state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cotune.errors import RunError
from cotune.plan.wire import Codec
from cotune.protocol.changes import MAX_CHANGES, RoundChange, count_cost
from cotune.protocol.codecs import pack, unpack
from cotune.protocol.messages import state_digest
from cotune.server.runs.state_headers import ChangeHeader
from cotune.storage.files import atomic_write, remove_parts
from cotune.storage.json_documents import parse_json


class ChangeFiles:
    """The files of one run."""

    def __init__(self, run: Path, codec: Codec) -> None:
        """Open the changes of a run without reading any.

        Args:
            run: Its folder.
            codec: In which changes travel; float32: there are none.
        """
        self._folder = run / "changes"
        self._codec: Codec = codec

    def write(
        self, round: int, before: Mapping[str, Tensor], start: Mapping[str, Tensor], change: Mapping[str, Tensor], after: str
    ) -> None:
        """Store what a round has changed, and remove files that no request will use any more.

        Args:
            round: Its number.
            before: The state after the round before.
            start: The state that organizations received, with the parameters that the round has added.
            change: Parameter -> difference, rounded to the codec.
            after: `state_digest` of the state after the round.
        """
        header = ChangeHeader(
            round=round,
            before=state_digest(before),
            start=state_digest(start),
            after=after,
            names=sorted(start),
            shapes={name: list(tensor.shape) for name, tensor in change.items()},
        )
        packed = {name: torch.frombuffer(bytearray(pack(self._codec, t)), dtype=torch.uint8) for name, t in change.items()}
        file = self._file(round)
        remove_parts(file)
        atomic_write(file, save(packed, metadata={"change": json.dumps(header.as_json())}))
        self._prune(round, count_cost(start, "float32"))

    def read_before(self, round: int, state: Mapping[str, Tensor]) -> list[RoundChange]:
        """Return the changes of the rounds right before a round, the oldest first, as far back as they can save bytes.

        Args:
            round: Its number.
            state: The state after the round before.
        """
        found: list[RoundChange] = []
        if self._codec == "float32" or round == 1:
            return found
        wanted = state_digest(state)
        budget = count_cost(state, "float32")
        for number in range(round - 1, max(0, round - 1 - MAX_CHANGES), -1):
            read = self._read(number)
            if read is None or read[0].after != wanted:
                break
            header, values = read
            budget -= count_cost(values, self._codec)
            if budget <= 0:
                break
            found.append(RoundChange(number, header.start, frozenset(header.names), values))
            wanted = header.before
        return found[::-1]

    def _prune(self, newest: int, budget: int) -> None:
        """Remove the files with which a request would not be smaller than the whole state, or would hold too many changes."""
        names = (file.stem.removeprefix("round-") for file in self._folder.glob("round-*.safetensors"))
        numbers = {int(name) for name in names if name.isdecimal()}
        for number in sorted(numbers, reverse=True):
            file = self._file(number)
            if not file.is_file():  # somebody else's, such as round-7.safetensors
                continue
            budget -= file.stat().st_size  # less than the cost of its change
            if budget <= 0 or number <= newest - MAX_CHANGES:
                file.unlink()

    def _file(self, round: int) -> Path:
        return self._folder / f"round-{round:05d}.safetensors"

    def _read(self, round: int) -> tuple[ChangeHeader, dict[str, Tensor]] | None:
        """Return (header, parameter -> difference) of a round; None if its file is missing or damaged."""
        try:
            with safe_open(self._file(round), framework="pt") as file:
                header = ChangeHeader.model_validate(parse_json(file.metadata()["change"]))
                packed = {name: file.get_tensor(name).numpy().tobytes() for name in header.shapes}
            values = {name: unpack(self._codec, packed[name], tuple(shape)) for name, shape in header.shapes.items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError, RunError):
            return None
        return (header, values) if header.round == round else None
