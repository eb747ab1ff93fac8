"""Who has left of its own accord, as by Ctrl-C, and whose machine or network is gone.

The SuperLink shows both as offline. But a node is online until its heartbeats are missing, at a time that the SuperLink tells
beforehand; whoever leaves is offline before that time, which the SuperLink then moves to the present.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LEFT = "it has left the federation; it is asked again once it rejoins"
_LOOKS = 2  # a node that connects anew may be offline for a moment


@dataclass(frozen=True)
class Seen:
    """An organization's node at one look. until: when it is, or was, offline without another heartbeat, in seconds since 1970."""

    organization: str
    online: bool
    until: float


class Presence:
    """Look after look. left: who is offline, and had left before."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}  # of those that were online
        self._looks: dict[str, int] = {}
        self.left: frozenset[str] = frozenset()

    def look(self, nodes: Iterable[Seen]) -> None:
        for node in nodes:
            if node.online:
                self._until[node.organization] = node.until
                self._looks.pop(node.organization, None)
            elif node.until < self._until.get(node.organization, 0.0):
                self._looks[node.organization] = self._looks.get(node.organization, 0) + 1
        self.left = frozenset(name for name, looks in self._looks.items() if looks >= _LOOKS)
