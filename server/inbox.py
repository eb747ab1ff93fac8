"""Updates that came before their turn, put aside on disk, so that memory does not grow with the number of organisations."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from cotune.models.errors import RunError
from cotune.strategies.update_file import read_update, update_bytes
from cotune.strategies.updates import Update


class Inbox:
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


class Turns:
    """Gives updates back in the order of the organisations, whoever came first: each as soon as all before it are settled."""

    def __init__(self, order: Sequence[str], inbox: Inbox) -> None:
        self._number = {name: i for i, name in enumerate(order)}
        self._inbox, self._next = inbox, 0
        self._settled: dict[int, bool] = {}  # who is done before their turn -> whether an update was put aside

    def settle(self, name: str, update: Update | None) -> Iterator[Update]:
        """What can be added now that this organisation has sent an update, or will send none."""
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
