"""Whether a federation's server lets this organisation in, found out before it joins."""

from __future__ import annotations

import fcntl
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cotune.client.credentials import read_private_key
from cotune.client.fleet import FleetError, connected
from cotune.client.reach import reach
from cotune.client.site import Site
from cotune.models.errors import RunError

__all__ = ["Tried", "try_connection", "versions"]


@dataclass(frozen=True)
class Tried:
    """expires: ISO 8601, of the server's certificate. problem: why this organisation would not get in; None: it would.

    served: a node of this site runs, and holds the key at the server; whether it is connected, it says itself.
    """

    address: str
    problem: str | None
    expires: str | None = None
    days_left: int | None = None
    served: bool = False


def try_connection(site: Site, address: str, certificates: bytes | None) -> Tried:
    """Connects with the organisation's key, and leaves at once. Raises RunError for a key that cannot be used.

    While a node serves this site nobody else is let in with its key: then only the server is looked at.
    """
    key = read_private_key(site.folder / "node.key")
    try:
        expires = reach(address, certificates)
    except RunError as error:
        return Tried(address, str(error))
    tried = Tried(address, None, expires.isoformat(timespec="seconds"), (expires - datetime.now(UTC)).days)
    if _is_served(site.folder / "node" / "lock"):
        return Tried(**{**vars(tried), "served": True})
    try:
        with connected(address, certificates, key) as fleet:
            fleet.leave()
    except FleetError as error:
        return Tried(**{**vars(tried), "problem": str(error)})
    return tried


def _is_served(lock: Path) -> bool:
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def versions() -> dict[str, str]:
    """Of what has a say in whether two sides understand each other, and in what training costs."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("cotune", "flwr", "torch", "transformers", "opacus"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
