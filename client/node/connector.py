"""How a node connects with its site's keys, and a check of whether a server lets the organization in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cotune.client.node.keys import activate_next_key, read_next_key, write_public_key
from cotune.client.node.trust import Trust
from cotune.client.site import Site
from cotune.client.site_folder import SitePaths
from cotune.client.site_setup import read_certificates, read_private_key
from cotune.errors import RunError
from cotune.flower.fleet_client import FleetClient, connect
from cotune.flower.fleet_errors import FleetError, NodeRejected
from cotune.protocol.connectivity import check_reachable
from cotune.storage.files import is_locked


class Connector:
    """Connects a node to its server. Keys and authorities are reloaded for every connection, as both may be renewed meanwhile.

    Args:
        site: The folder of the site.
        address: host:port of the server.
        root_certificates: A PEM file. For the site's own node/ca.crt, the authorities are those that the site trusts at the time.
        key: A private key. For the site's own node.key, the next key is tried once a server refuses the present one.
        connect: Opens a connection, as `flower.fleet_client.connected`.

    Raises:
        RunError: A file cannot be used.
    """

    def __init__(
        self,
        site: Path,
        address: str,
        root_certificates: Path | None,
        key: Path,
        connect: Callable[..., AbstractContextManager[FleetClient]] = connect,
    ) -> None:
        self._site = SitePaths(site)
        self._address = address
        self._root = root_certificates
        self._key = key
        self._connect = connect
        self._certificates()
        present = read_private_key(key)
        if self._is_own_key:
            write_public_key(site, present)  # a renewal may have been cut off before it

    @contextmanager
    def __call__(self, known: int | None, reconnect: bool) -> Iterator[FleetClient]:
        """Connect, as `flower.fleet_client.connected` does."""
        certificates = self._certificates()
        with ExitStack() as held:
            try:
                fleet = held.enter_context(
                    self._connect(self._address, certificates, read_private_key(self._key), known, reconnect)
                )
            except NodeRejected as refused:
                fleet = self._enter_with_next(held, certificates, refused)
            yield fleet

    def _enter_with_next(self, held: ExitStack, certificates: bytes | None, refused: NodeRejected) -> FleetClient:
        """refused: raised again where there is no next key, or the server does not know that either."""
        following = read_next_key(self._site.folder) if self._is_own_key else None
        if following is None:
            raise refused
        try:
            fleet = held.enter_context(self._connect(self._address, certificates, following))
        except NodeRejected:
            raise refused from None
        activate_next_key(self._site.folder, following)
        return fleet

    @property
    def _is_own_key(self) -> bool:
        return self._key == self._site.private_key

    def _certificates(self) -> bytes | None:
        if self._root == self._site.node.certificates and self._site.node.trust.exists():
            return Trust.read(self._site.folder).certificates()
        return read_certificates(self._root)


@dataclass(frozen=True)
class ConnectionReport:
    """Whether the organization would be let in.

    Attributes:
        address: Of the server.
        problem: Why it would not; None: it would.
        expires: When the server's certificate expires, ISO 8601.
        days_left: Until then.
        served: Whether a node of this site runs, and holds the key at the server: only the server was looked at then.
    """

    address: str
    problem: str | None
    expires: str | None = None
    days_left: int | None = None
    served: bool = False


def check_connection(site: Site, address: str, certificates: bytes | None) -> ConnectionReport:
    """Connect with the organization's key, and leave at once.

    While a node serves this site, nobody else is let in with its key: then only the server is looked at.

    Raises:
        RunError: The key cannot be used.
    """
    key = read_private_key(site.private_key)
    try:
        expires = check_reachable(address, certificates)
    except RunError as error:
        return ConnectionReport(address, str(error))
    tried = ConnectionReport(address, None, expires.isoformat(timespec="seconds"), (expires - datetime.now(UTC)).days)
    if is_locked(site.node.lock):
        return ConnectionReport(**{**vars(tried), "served": True})
    try:
        with connect(address, certificates, key) as fleet:
            fleet.leave()
    except FleetError as error:
        return ConnectionReport(**{**vars(tried), "problem": str(error)})
    return tried


def versions() -> dict[str, str]:
    """Return the versions that decide whether two sides understand each other, and what training costs."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("cotune", "flwr", "torch", "transformers", "opacus"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
