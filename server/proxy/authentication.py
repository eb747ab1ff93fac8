"""Authenticate a request by its head: a member's public key, and its signature over the time.

This is the check of Flower's SuperLink (flwr.superlink.routers.fleet.node_auth), made before any content is read. Whether the
node number in the content belongs to the key is left to the SuperLink.
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
from cotune.server.proxy.fleet_types import FleetFormat

FindMember = Callable[[bytes], str | None]  # public key (PEM) -> the member that it belongs to

_NOT_REGISTERED = 2004  # Flower's code for a node that cannot be activated
_UNKNOWN_KEY = "the key is not that of a member: expected one that the coordinator has invited (`cotune server invite`)"
_UNSIGNED = "Invalid SuperNode authentication"  # the SuperLink's own wording


def authenticate(
    headers: Iterable[tuple[bytes, bytes]], call: str, known: FindMember, fleet: FleetFormat, now: datetime | None = None
) -> str | Refusal:
    """Return the member that signed a request, or the refusal if none did.

    Args:
        headers: Of the request, names in lower case.
        call: Its name. An unknown key that wants to join gets the SuperLink's answer for a key that is not registered.
        known: Returns the member that a public key belongs to.
        fleet: Names of the headers, and the tolerances for times.
        now: The server's time; None: read the clock.
    """
    names = fleet.authentication_headers
    found = [(name, value) for name, value in headers if name in names]
    if len(found) != len(names):  # with a header given twice, the SuperLink might use the other value
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
    """Parse the public key of a member; unknown keys are refused before."""
    try:
        found = load_pem_public_key(key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return found if isinstance(found, EllipticCurvePublicKey) else None
