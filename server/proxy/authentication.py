"""Who calls, by a request's head alone: the key of a member, and its signature over the time.

It is the check of Flower's SuperLink (flwr.superlink.routers.fleet.node_auth), made before a byte of the content is read. What
needs the content stays the SuperLink's: that the node number in it is the one of the key.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from cotune.server.proxy.fleet_format import FleetFormat
from cotune.server.proxy.rules import Refusal

FindMember = Callable[[bytes], str | None]  # public key (PEM) -> the member that it belongs to

_NOT_REGISTERED = 2004  # Flower's code for a node that cannot be activated
_STRANGER = "the key is not that of a member: expected one that the coordinator has invited (`cotune server invite`)"
_UNSIGNED = "Invalid SuperNode authentication"  # as the SuperLink says it


def authenticate(
    headers: Iterable[tuple[bytes, bytes]], call: str, known: FindMember, fleet: FleetFormat, now: datetime | None = None
) -> str | Refusal:
    """The member that has signed a request, or why nobody has.

    Args:
        headers: of the request, names in lower case.
        call: its name. Anyone who wants to join is answered as the SuperLink answers a key that is not registered.
        known: asked for the key that the request shows.
        fleet: of the API that is called.
        now: the time by the server's clock.
    """
    names = fleet.authentication_headers
    found = [(name, value) for name, value in headers if name in names]
    if len(found) != len(names):  # of two keys the SuperLink might take the other one
        return Refusal(401, _UNSIGNED)
    try:
        shown = dict(found)
        key, signature = (b64decode(shown[name], validate=True) for name in names[:2])
        timestamp = shown[fleet.time_header]
        age = ((now or datetime.now(UTC)) - datetime.fromisoformat(timestamp.decode("ascii"))).total_seconds()
    except (KeyError, ValueError, TypeError, OverflowError, binascii.Error):
        return Refusal(401, _UNSIGNED)
    member = known(key)
    if member is None:
        return Refusal(412, _STRANGER, _NOT_REGISTERED) if call == "activate-node" else Refusal(401, _STRANGER)
    if not -fleet.clock_tolerance < age < fleet.max_age + fleet.clock_tolerance:
        return Refusal(401, f"the request was signed {age:.0f} seconds ago by this server's clock: set the clock")
    return member if _holds(key, timestamp, signature) else Refusal(401, _UNSIGNED)


def _holds(key: bytes, signed: bytes, signature: bytes) -> bool:
    public = _loaded(key)
    if public is None:
        return False
    try:
        public.verify(signature, signed, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=1024)
def _loaded(key: bytes) -> EllipticCurvePublicKey | None:
    """Of a member: a stranger's key never gets here."""
    try:
        found = load_pem_public_key(key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return found if isinstance(found, EllipticCurvePublicKey) else None
