"""Authentication of a request by its head alone: the key of a member, and its signature over the time.

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

from cotune.server.proxy.allowed_calls import Refusal
from cotune.server.proxy.fleet_format import FleetFormat

FindMember = Callable[[bytes], str | None]  # public key (PEM) -> the member that it belongs to

_NOT_REGISTERED = 2004  # Flower's code for a node that cannot be activated
_UNKNOWN_KEY = "the key is not that of a member: expected one that the coordinator has invited (`cotune server invite`)"
_UNSIGNED = "Invalid SuperNode authentication"  # as the SuperLink says it


def authenticate(
    headers: Iterable[tuple[bytes, bytes]], call: str, known: FindMember, fleet: FleetFormat, now: datetime | None = None
) -> str | Refusal:
    """Return the member that has signed a request, or the refusal where none has.

    Args:
        headers: Of the request, names in lower case.
        call: Its name. A node that wants to join is answered as the SuperLink answers a key that is not registered.
        known: Returns the member that a public key belongs to.
        fleet: Of the API that is called.
        now: The time by the server's clock.
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
        return Refusal(412, _UNKNOWN_KEY, _NOT_REGISTERED) if call == "activate-node" else Refusal(401, _UNKNOWN_KEY)
    if not -fleet.clock_tolerance < age < fleet.max_age + fleet.clock_tolerance:
        return Refusal(401, f"the request was signed {age:.0f} seconds ago by this server's clock: set the clock")
    return member if _is_signed(key, timestamp, signature) else Refusal(401, _UNSIGNED)


def _is_signed(key: bytes, signed: bytes, signature: bytes) -> bool:
    public = _load_key(key)
    if public is None:
        return False
    try:
        public.verify(signature, signed, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=1024)
def _load_key(key: bytes) -> EllipticCurvePublicKey | None:
    """Parse the key of a member: a stranger's key never gets here."""
    try:
        found = load_pem_public_key(key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return found if isinstance(found, EllipticCurvePublicKey) else None
