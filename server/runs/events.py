"""What happens in a run, one JSON object per line in events.jsonl, and to anyone who listens in this process."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from cotune.errors import RunError
from cotune.observers import Observer, Registry
from cotune.reporting.documents.events import Event, parse_event
from cotune.storage.json_documents import parse_json

_observers = Registry[Observer]()


def observe_run(observer: Observer) -> AbstractContextManager[None]:
    """Call the observer for every event of a run that this process plays, during the block."""
    return _observers.register(observer)


class Events:
    """A file of events, one JSON object per line.

    A line that a crash cut short is ended before the next one is written, and skipped by `read_events`.
    Readers leave the file as it is: its writer may be in the middle of a line.
    """

    def __init__(self, path: Path, *, silent: bool = False) -> None:
        self.path = path
        self.silent = silent
        self._lock = threading.Lock()
        self._begun = False

    def write(self, event: Event) -> None:
        """Append an event, with the present time, and call the observers.

        Raises:
            RunError: Where the file cannot be written.
        """
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"at": at, **event.as_json()}, ensure_ascii=False)
        with self._lock:
            try:
                self._begin()
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:  # for half a character
                    stream.write(line + "\n")
            except OSError as error:
                self._begun = False  # a part of the line may be there
                raise RunError(
                    f"{self.path} cannot be written ({error.strerror}): free space for it, or correct its permissions, then"
                    " continue with --resume",
                    code="run.not_writable",
                ) from None
        if not self.silent:
            _observers.notify(event.event, event.fields)

    def _begin(self) -> None:
        if self._begun:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("ab") as stream:
                stream.write(b"\n")
        self._begun = True


def read_events(path: Path) -> list[Event]:
    """Return the events of all whole lines."""
    return _parsed(path.read_bytes())


def _parsed(content: bytes) -> list[Event]:
    found = list[Event]()
    for line in content.split(b"\n"):  # splitlines would also cut at a line separator inside a text
        try:
            event = parse_json(line)
        except ValueError:
            continue  # cut short by a crash, perhaps within a letter
        if isinstance(event, dict) and "event" in event:
            found.append(parse_event(event))
    return found


def follow(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Read the events that another process has written from a byte on, as far as it has.

    A line without its end is left for the next call; one that a crash cut short is skipped.

    Returns:
        The events, and the byte to go on from.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            content = stream.read()
    except FileNotFoundError:
        return [], offset
    whole = content[: content.rfind(b"\n") + 1]
    return _parsed(whole), offset + len(whole)
