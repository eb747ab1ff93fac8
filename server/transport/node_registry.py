"""Map nodes to organizations, and find out which are connected and which have left voluntarily.

In a real run an organization is identified only by its public key, never by what it states. In a simulation the i-th organization
is at the i-th node; if there are fewer nodes than organizations, one node serves several.

The SuperLink shows a node as offline both if it left voluntarily, as by Ctrl-C, and if its machine or network failed. The two
differ in time: the SuperLink announces when a node will be offline without another heartbeat. A node that fails is online until
then; one that leaves is offline earlier, and the SuperLink sets that time to the present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from flwr.serverapp import Grid

from cotune.flower.nodes import RegisteredNode

LEFT = "it has left the federation; it is asked again once it rejoins"
_LOOKS = 2  # checks in a row; a node that reconnects may be offline for a moment


@dataclass(frozen=True)
class Seen:
    """An organization's node at one check.

    Attributes:
        organization: Whose node it is.
        online: Whether it is online.
        until: When it goes, or went, offline without another heartbeat, in seconds since 1970.
    """

    organization: str
    online: bool
    until: float


class Presence:
    """Distinguishes nodes that have left voluntarily from those that failed, over successive checks.

    Attributes:
        left: Organizations that are offline because they left voluntarily.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}  # of those that were online
        self._looks: dict[str, int] = {}
        self.left: frozenset[str] = frozenset()

    def look(self, nodes: Iterable[Seen]) -> None:
        """Update `left` by the nodes of one check."""
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
        id: Flower's number of the node.
        since: When it last connected, as the SuperLink reports it.
    """

    id: int
    since: str = ""


class NodeRegistry(Protocol):
    """Knows which node belongs to which organization."""

    def connected(self) -> Mapping[str, Node]:
        """Return organization -> node of those that are connected now; it asks the grid, and raises what that raises."""
        ...

    def left(self) -> frozenset[str]:
        """Return the organizations that had left voluntarily at the last call of `connected`."""
        ...

    def revoked(self) -> frozenset[str]:
        """Return the organizations whose invitation was revoked at the last call of `connected`."""
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
        self._found: tuple[list[int], Mapping[str, Node]] = [], MappingProxyType({})  # the numbers of the grid, and what follows

    def connected(self) -> Mapping[str, Node]:
        """Return organization -> node; empty if there is no node."""
        numbers = list(self._grid.get_node_ids())
        if numbers != self._found[0]:
            nodes = [Node(number) for number in sorted(numbers)]
            self._found = numbers, MappingProxyType({name: nodes[i % len(nodes)] for i, name in enumerate(self._names)})
        return self._found[1]

    def left(self) -> frozenset[str]:
        """Return nothing: simulated organizations do not leave."""
        return frozenset()

    def revoked(self) -> frozenset[str]:
        """Return nothing: a simulation has no invitations."""
        return frozenset()


class Nodes(Protocol):
    """A connection to a SuperLink."""

    def get_nodes(self) -> Iterable[RegisteredNode]:
        """Return the nodes that the SuperLink knows."""
        ...


@dataclass(frozen=True)
class Roster:
    """The organizations of a federation at one moment.

    Attributes:
        names: Public key, in Flower's format -> the organization that may take part with it.
        revoked: Names of the organizations whose invitation was revoked.
    """

    names: Mapping[bytes, str]
    revoked: frozenset[str]


class RegisteredNodes:
    """The nodes of a real run: organizations are identified by their keys in the federation's list of members."""

    def __init__(self, line: Nodes, read_roster: Callable[[], Roster]) -> None:
        """Create the registry.

        Args:
            line: A connection to a SuperLink that authenticates its nodes.
            read_roster: Reads the list of members; called at each check, as an invitation may be revoked during a run.
        """
        self._line = line
        self._read_roster = read_roster
        self._presence = Presence()
        self._revoked: frozenset[str] = frozenset()

    def connected(self) -> dict[str, Node]:
        """Return organization -> node of those that are connected.

        Raises:
            RunError: If the list of members is damaged.
        """
        roster = self._read_roster()
        names = roster.names
        self._revoked = roster.revoked
        nodes = [node for node in self._line.get_nodes() if node.key in names]
        self._presence.look(Seen(names[node.key], node.online, node.until) for node in nodes)
        return {names[node.key]: Node(node.id, node.last_online) for node in nodes if node.online}

    def left(self) -> frozenset[str]:
        """Return the organizations that had left voluntarily at the last call of `connected`."""
        return self._presence.left

    def revoked(self) -> frozenset[str]:
        """Return the organizations whose invitation was revoked at the last call of `connected`."""
        return self._revoked
