"""Keep the keys registered at the SuperLink identical to those of the active members, even if either of them changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, Self

from cotune.errors import RunError
from cotune.flower.nodes import RegisteredNode
from cotune.server.deployment.members import Member
from cotune.server.transport.node_registry import Presence, Seen

_MAX_SILENT_FAILURES = 6  # failures in a row that are not reported: a restarted SuperLink answers by then

Report = Callable[[str], None]


class KeyRegistry(Protocol):
    """Where keys are registered: the SuperLink's Control API."""

    def nodes(self) -> tuple[RegisteredNode, ...]:
        """Return all registered nodes."""
        ...

    def register(self, key: bytes, name: str) -> int:
        """Register a public key (PEM) under a name, and return Flower's number of the node."""
        ...

    def unregister(self, node: int) -> None:
        """Remove a node, whose key is no longer accepted."""
        ...


def reconcile(registry: KeyRegistry, members: Iterable[Member], say: Report, presence: Presence | None = None) -> set[str]:
    """Register the keys of members at the SuperLink, and remove every other key.

    Args:
        registry: Where keys are registered.
        members: All members, including revoked ones.
        say: Called with a line for every change.
        presence: Updated by the members' nodes.

    Returns:
        The names of the members that are online.

    Raises:
        RunError: If a call of the registry fails.
    """
    everybody = {member.key: member for member in members}
    named = {key: member.name for key, member in everybody.items() if member.revoked is None}
    nodes = registry.nodes()
    for node in nodes:
        if node.key not in named:
            registry.unregister(node.id)
            say(f"{_describe_owner(node.key, everybody, named)} is shut out")
    _register_members(registry, {key: name for key, name in named.items() if key not in {node.key for node in nodes}}, say)
    known = [node for node in nodes if node.key in named]
    if presence is not None:
        presence.look(Seen(named[node.key], node.online, node.until) for node in known)
    return {named[node.key] for node in known if node.online}


def _describe_owner(key: bytes, everybody: Mapping[bytes, Member], named: Mapping[bytes, str]) -> str:
    if key not in everybody:
        return "a key of nobody"
    name = everybody[key].name
    return f"the former key of {name}" if name in named.values() else name


def _register_members(registry: KeyRegistry, named: Mapping[bytes, str], say: Report) -> None:
    refused = list[RunError]()
    for key, name in named.items():
        try:
            registry.register(key, name)
            say(f"{name} may join")
        except RunError as error:  # the other members can still be registered
            refused.append(error)
    if refused:
        raise refused[0]


class NodeRegistration:
    """A context manager that reconciles at intervals, in its own thread, as the SuperLink may answer slowly.

    Args:
        connect: Opens the registry.
        members: Returns all members.
        say: Called with a line for every change.
        interval: Seconds between two reconciliations.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[KeyRegistry]],
        members: Callable[[], Iterable[Member]],
        say: Report,
        interval: float = 2.0,
    ) -> None:
        self._interval = interval
        self._connect = connect
        self._members = members
        self._say = say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._online: set[str] = set()
        self._presence = Presence()
        self._left = frozenset[str]()
        self._reached = False
        self._failures = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(self._interval)

    @property
    def ready(self) -> bool:
        """Whether the members have been registered at least once."""
        return self._reached

    def _run(self) -> None:
        with self._connect() as registry:
            while not self._stop.is_set():
                self._reconcile_once(registry)
                self._stop.wait(self._interval)

    def _reconcile_once(self, registry: KeyRegistry) -> None:
        try:
            online = reconcile(registry, self._members(), self._say, self._presence)
        except Exception as error:  # registration must continue whatever happens, and the end of a thread would go unnoticed
            self._failures += 1
            if self._reached and self._failures == _MAX_SILENT_FAILURES and not self._stop.is_set():
                self._say(f"the SuperLink does not know at present who may join: {error}")
            return
        if self._failures >= _MAX_SILENT_FAILURES and self._reached:
            self._say("the SuperLink knows who may join")
        self._reached = True
        self._failures = 0
        for name in sorted(online ^ self._online):
            self._say(f"{name} is {'online' if name in online else 'offline'}")
        for name in sorted(self._presence.left - self._left):
            self._say(f"{name} has left the federation")
        self._online = online
        self._left = self._presence.left
