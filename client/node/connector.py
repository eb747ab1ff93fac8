"""Connect a node with its site's keys, and check whether a server accepts the organization."""

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
    """Connects a node to its server. Keys and authorities are loaded for every connection, as both may be renewed at any time.

    Args:
        site: The folder of the site.
        address: host:port of the server.
        root_certificates: A PEM file. For the site's own node/ca.crt, the authorities that the site currently trusts are used.
        key: A private key. For the site's own node.key, the next key is tried if a server refuses the current one.
        connect: Opens a connection, as `flower.fleet_client.connect` does.

    Raises:
        RunError: If a file cannot be used.
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
            write_public_key(site, present)  # a renewal may have been interrupted before this

    @contextmanager
    def __call__(self, known: int | None, reconnect: bool) -> Iterator[FleetClient]:
        """Connect, as `flower.fleet_client.connect` does."""
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
        """Connect with the next key; raises `refused` again if there is none, or the server does not know it either."""
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
    """Whether the server accepts the organization.

    Attributes:
        address: Of the server.
        problem: Why it does not; None: it does.
        expires: When the server's certificate expires, ISO 8601.
        days_left: Days until then.
        served: Whether a node of this site is running. It occupies the key at the server, so only the server itself was checked.
    """

    address: str
    problem: str | None
    expires: str | None = None
    days_left: int | None = None
    served: bool = False


def check_connection(site: Site, address: str, certificates: bytes | None) -> ConnectionReport:
    """Check whether the server accepts the organization's key, by connecting and leaving at once.

    While a node of this site is running, the server accepts no second connection with its key; then only the server is checked.

    Args:
        site: Of the organization.
        address: host:port of the server.
        certificates: PEM of the trusted authorities; None: those that this machine trusts.

    Raises:
        RunError: If the key cannot be used.
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
    """Return the versions that affect compatibility with a server, and the cost of training."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("cotune", "flwr", "torch", "transformers", "opacus"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
