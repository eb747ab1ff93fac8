"""Which node belongs to which organization, who is connected, and who has left of its own accord.

In a real run an organization is known by its public key alone, never by what it says. In a simulation the i-th organization is at
the i-th node; with fewer nodes than organizations, nodes serve several.

The SuperLink shows as offline both those that have left of their own accord, as by Ctrl-C, and those whose machine or network is
gone. They differ in time: a node is online until its heartbeats are missing, at a time that the SuperLink tells beforehand; one
that leaves is offline before that time, which the SuperLink then moves to the present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.serverapp import Grid

from cotune.flower.nodes import RegisteredNode

LEFT = "it has left the federation; it is asked again once it rejoins"
_LOOKS = 2  # a node that reconnects may be offline for a moment


@dataclass(frozen=True)
class Seen:
    """An organization's node at one look.

    Attributes:
        organization: Whose node it is.
        online: Whether it is online.
        until: When it is, or was, offline without another heartbeat, in seconds since 1970.
    """

    organization: str
    online: bool
    until: float


class Presence:
    """Tells apart who has left and who is gone, look after look.

    Attributes:
        left: Organizations that are offline as they have left of their own accord.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}  # of those that were online
        self._looks: dict[str, int] = {}
        self.left: frozenset[str] = frozenset()

    def look(self, nodes: Iterable[Seen]) -> None:
        """Take the nodes of one look into account."""
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
    """The node of an organization.

    Attributes:
        id: Flower's number of it.
        since: When it last connected, as the SuperLink says.
    """

    id: int
    since: str = ""


class NodeRegistry(Protocol):
    """Knows which node belongs to which organization."""

    def connected(self) -> Mapping[str, Node]:
        """Return organization -> node of those that are connected now. Asks the grid, and may fail as that does."""
        ...

    def left(self) -> frozenset[str]:
        """Return those that had left of their own accord at that look."""
        ...

    def revoked(self) -> frozenset[str]:
        """Return those that may not take part any more, at that look."""
        ...


class SimulatedNodes:
    """The nodes of a simulation: the i-th organization is at the i-th node."""

    def __init__(self, grid: Grid, names: Iterable[str]) -> None:
        """Create the registry.

        Args:
            grid: The grid of the simulation.
            names: The organizations of the run, in their order.
        """
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
    """A connection to a SuperLink."""

    def get_nodes(self) -> Iterable[RegisteredNode]: ...


@dataclass(frozen=True)
class Roster:
    """The organizations of a federation at one moment.

    Attributes:
        names: Public key, as Flower keeps it -> the organization that may take part with it.
        revoked: Names of the organizations whose invitation was revoked.
    """

    names: Mapping[bytes, str]
    revoked: frozenset[str]


class RegisteredNodes:
    """The nodes of a real run: organizations are known by their keys in the federation's list of members."""

    def __init__(self, line: Nodes, read_roster: Callable[[], Roster]) -> None:
        """Create the registry.

        Args:
            line: A connection to a SuperLink that authenticates its nodes.
            read_roster: Reads the members again, as an invitation may be revoked during a run.
        """
        self._line = line
        self._read_roster = read_roster
        self._presence = Presence()
        self._revoked: frozenset[str] = frozenset()

    def connected(self) -> dict[str, Node]:
        """Return organization -> node of those that are connected. Raises RunError for a damaged list of members."""
        roster = self._read_roster()
        names = roster.names
        self._revoked = roster.revoked
        nodes = [node for node in self._line.get_nodes() if node.key in names]
        self._presence.look(Seen(names[node.key], node.online, node.until) for node in nodes)
        return {names[node.key]: Node(node.id, node.last_online) for node in nodes if node.online}

    def left(self) -> frozenset[str]:
        return self._presence.left

    def revoked(self) -> frozenset[str]:
        return self._revoked
