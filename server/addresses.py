"""Which node belongs to which organisation, and who is connected.

In a real run an organisation is known by its public key alone, never by what somebody says. In a simulation the i-th organisation
is at the i-th node; with fewer nodes than organisations, nodes serve several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from flwr.serverapp import Grid

from cotune.server.federation import FederationFolder
from cotune.server.members import Member
from cotune.server.run_folder import RunFolder

__all__ = ["REVOKED", "Addresses", "Registered", "Simulated", "addresses_of", "members_of"]

REVOKED = "its invitation was revoked"


class Addresses(Protocol):
    def connected(self) -> Mapping[str, int]:
        """Organisation -> node id, of those that are connected now. Asks the grid, and may fail as that does."""
        ...


class Simulated:
    """names: the organisations of the run, in their order."""

    def __init__(self, grid: Grid, names: Iterable[str]) -> None:
        self._grid, self._names = grid, tuple(names)

    def connected(self) -> dict[str, int]:
        nodes = sorted(self._grid.get_node_ids())
        return {name: nodes[i % len(nodes)] for i, name in enumerate(self._names)} if nodes else {}


class Registered:
    """By the keys in the federation's list of members. grid: of a SuperLink with authentication of its nodes."""

    def __init__(self, grid: Grid, federation: Path) -> None:
        self._grid, self._federation = grid, federation

    def connected(self) -> dict[str, int]:
        """Raises RunError for a damaged list of members."""
        names = {member.key: member.name for member in members_of(self._federation).values()}
        nodes = [node for node in self._grid.get_nodes() if node.status in ("", "online")]
        return {names[node.public_key]: node.node_id for node in nodes if node.public_key in names}


def members_of(federation: Path) -> dict[str, Member]:
    """Those that may take part, by name. Read anew every time: an invitation may be revoked during a run."""
    return {member.name: member for member in FederationFolder(federation).members.active()}


def addresses_of(grid: Grid, folder: RunFolder) -> Addresses:
    if folder.file.federation:
        return Registered(grid, Path(folder.file.federation))
    return Simulated(grid, [participant.name for participant in folder.file.participants])
