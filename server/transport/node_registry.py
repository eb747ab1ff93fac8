"""Which node belongs to which organization, who is connected, and who has left of its own accord.

In a real run an organization is known by its public key alone, never by what somebody says. In a simulation the i-th organization
is at the i-th node; with fewer nodes than organizations, nodes serve several.

Who has left of its own accord, as by Ctrl-C, and whose machine or network is gone.

The SuperLink shows both as offline. But a node is online until its heartbeats are missing, at a time that the SuperLink tells
beforehand; anyone who leaves is offline before that time, which the SuperLink then moves to the present.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.serverapp import Grid

from cotune.flower.nodes import RegisteredNode
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.members import Member

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


REVOKED = "its invitation was revoked"


@dataclass(frozen=True)
class Node:
    """since: when it last connected, as the SuperLink says it."""

    id: int
    since: str = ""


class NodeRegistry(Protocol):
    def connected(self) -> Mapping[str, Node]:
        """Organization -> node, of those that are connected now. Asks the grid, and may fail as that does."""
        ...

    def left(self) -> frozenset[str]:
        """Those that had left of their own accord at that look."""
        ...

    def revoked(self) -> frozenset[str]:
        """Those that may not take part any more, at that look."""
        ...


class Simulated:
    """names: the organizations of the run, in their order."""

    def __init__(self, grid: Grid, names: Iterable[str]) -> None:
        self._grid = grid
        self._names = tuple(names)

    def connected(self) -> dict[str, Node]:
        nodes = [Node(number) for number in sorted(self._grid.get_node_ids())]
        return {name: nodes[i % len(nodes)] for i, name in enumerate(self._names)} if nodes else {}

    def left(self) -> frozenset[str]:
        return frozenset()

    def revoked(self) -> frozenset[str]:
        return frozenset()


class Nodes(Protocol):
    def get_nodes(self) -> Iterable[RegisteredNode]: ...


class Registered:
    """By the keys in the federation's list of members. line: to a SuperLink with authentication of its nodes."""

    def __init__(self, line: Nodes, federation: Path) -> None:
        self._line = line
        self._federation = federation
        self._presence = Presence()
        self._revoked: frozenset[str] = frozenset()

    def connected(self) -> dict[str, Node]:
        """Raises RunError for a damaged list of members."""
        members = FederationFolder(self._federation).members.all()
        names = {member.key: member.name for member in members if member.revoked is None}
        self._revoked = frozenset(member.name for member in members) - set(names.values())
        nodes = [node for node in self._line.get_nodes() if node.key in names]
        self._presence.look(Seen(names[node.key], node.online, node.until) for node in nodes)
        return {names[node.key]: Node(node.id, node.last_online) for node in nodes if node.online}

    def left(self) -> frozenset[str]:
        return self._presence.left

    def revoked(self) -> frozenset[str]:
        return self._revoked


def members_of(federation: Path) -> dict[str, Member]:
    """Those that may take part, by name. Read anew every time: an invitation may be revoked during a run."""
    return {member.name: member for member in FederationFolder(federation).members.active()}
