"""What a running node prints: a line on standard output for each event, and its log on standard error.

The events are those of `client.local_events`. The log is that of Python's `logging`: every module of cotune has a logger of
its own name, and nothing is written to a file; who runs the node as a service keeps both streams. The record of what has left the
organization is not printed but kept in the site (`client.audit_log`).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape

from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.formatting import SPACE, duration, size


def limit_log() -> None:
    """Log errors alone: what else the node's loggers say, `NodeOutput` prints, once."""
    logging.getLogger("cotune").setLevel(logging.ERROR)


class NodeOutput:
    """Prints a line for each event of the node; why it is not connected, or sends nothing, is printed once until it changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._problem = ""
        self._withheld = ("", "")
        self._has_begun = False

    def __call__(self, what: str, about: dict[str, Any]) -> None:
        line = getattr(self, f"_{what}", lambda **_: None)(**about)
        if line is not None:
            with suppress(OSError):  # a closed pipe is no reason to stop training
                self._console.print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line.replace(SPACE, ' ')}")

    def _connected(self, node: int) -> str:
        self._problem = ""
        return "connected"

    def _disconnected(self, reason: str) -> str | None:
        known = self._problem
        self._problem = reason
        return None if known == reason else f"[yellow]not connected[/yellow]: {escape(reason)}; it is tried again and again"

    def _begun(self, round: str, trains: bool) -> str | None:
        if not trains or self._withheld[0] == round:
            return None  # it gets the finished model, or is asked again for what it has declined
        first = not self._has_begun
        self._has_begun = True
        return f"round {escape(round)} begins" + ("; first, records are encoded, which may take minutes" if first else "")

    def _again(self, round: str, reason: str) -> str:
        return f"[yellow]round {escape(round)} begins again[/yellow]: {escape(reason)}"

    def _dropped(self, round: str, reason: str) -> str:
        return f"round {escape(round)} is not answered: {escape(reason)}"

    def _answered(self, round: str, seconds: float, entry: dict[str, Any]) -> str | None:
        if entry.get("what") == "receipt":
            return f"the finished model is in {escape(str(entry.get('model')))}"
        if entry.get("what") != "update":
            return self._nothing_sent(round, str(entry.get("reason", "see the log")))
        self._withheld = ("", "")
        spent = "without privacy"
        if entry.get("epsilon_spent") is not None:
            spent = f"ε {round_up(entry['epsilon_spent'])} of {entry['epsilon_allowed']:g} spent"
        return f"round {escape(round)} is answered: {size(entry['bytes'])} sent after {duration(seconds)}, {spent}"

    def _nothing_sent(self, round: str, why: str) -> str | None:
        """Return nothing if the same request was repeated, and the reason was printed before."""
        known = self._withheld
        self._withheld = (round, why)
        if known == (round, why):
            return None
        told = ", for the same reason" if known[1] == why else f": {escape(why)}"
        return f"[yellow]round {escape(round)}: no update was sent[/yellow]{told}"
