"""Signed statements of what a server requested and what an organization replied, which third parties can verify.

A server signs each request with the federation's Ed25519 key (RFC 8032), whose public half is in federation.toml; an organization
signs each reply with the ECDSA key by which the server identifies its node. A statement is JSON with sorted keys and without
spaces, so that equal content gives equal text. Its kind is signed with it, so that a signature cannot be used for another kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cotune.errors import RunError

# kinds of request
TRAIN = "train"
FINISHED = "finished"
# kinds of reply
UPDATE = "update"
RECEIPT = "receipt"
REFUSAL = "refusal"
_MAX_STATEMENT_LENGTH = 4096  # characters of a statement


@dataclass(frozen=True)
class Statement:
    """Base of signed statements. The names of the fields are the keys in the JSON."""

    def text(self) -> str:
        """Return the canonical JSON, without fields at their defaults: these were added to the protocol later."""
        default = {field.name: field.default for field in fields(self)}
        found = {name: value for name, value in asdict(self).items() if value != default[name]}
        return json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, by which a reply refers to its request."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def message(self) -> bytes:
        """Return the bytes that are signed."""
        return b"cotune " + type(self).__name__.encode() + b" 1\0" + self.text().encode()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the canonical text of a statement; raises RunError for anything else."""
        try:
            found = json.loads(text) if len(text) <= _MAX_STATEMENT_LENGTH else {}
            known = [field for field in fields(cls) if field.default is MISSING or field.name in found]
            statement = cls(**{field.name: _check_type(found[field.name], str(field.type)) for field in known})
        except (ValueError, TypeError, KeyError, RecursionError):
            statement = None
        if statement is None or statement.text() != text:
            raise RunError(
                f"a signature contains {text!r:.80}: expected the canonical text of a {cls.__name__}",
                code="run.malformed_signature",
            )
        return statement


@dataclass(frozen=True)
class RequestStatement(Statement):
    """The signed part of a request.

    Attributes:
        federation: Its id.
        run: Its id.
        kind: `TRAIN` or `FINISHED`.
        plan: Its id.
        round: The round.
        recipient: The organization that is asked.
        admitted: As in the request.
        received: `received_digest` of its arrays.
        cohort: Number of organizations in the cohort.
        roster: `roster_digest` of their keys.
        serial: Greater than that of every earlier request of the federation.
        at: When (UTC, to the second).
        least: The smallest number of records that the recipient may declare, as agreed by its invitation.
        most: The largest number of records; 0: no limit.
        refused: Why an update of it was last rejected; "": none was.
        strikes: Number of its rejected updates and timeouts.
    """

    federation: str
    run: str
    kind: str
    plan: str
    round: int
    recipient: str
    admitted: int
    received: str
    cohort: int
    roster: str
    serial: int
    at: str
    least: int = 0
    most: int = 0
    refused: str = ""
    strikes: int = 0

    @property
    def declarable(self) -> tuple[int, int] | None:
        """The smallest and largest number of records that the recipient may declare; None: whatever the plan allows."""
        return (self.least, self.most) if self.most else None


@dataclass(frozen=True)
class ReplyStatement(Statement):
    """The signed part of a reply.

    Attributes:
        request: Digest of the request's statement.
        sender: The organization.
        kind: `UPDATE`, `RECEIPT` or `REFUSAL`.
        sha256: `content_digest` of the reply; `refusal_digest` of a refusal.
        trusts: The newest signing key of the server that the organization knows, as hex.
    """

    request: str
    sender: str
    kind: str
    sha256: str
    trusts: str


def _check_type(value: Any, kind: str) -> Any:
    if type(value).__name__ != kind:
        raise TypeError(kind)
    return value


def sign(statement: Statement, key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> str:
    """Return the signature of a statement, as hex."""
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(statement.message()).hex()
    return key.sign(statement.message(), ECDSA(hashes.SHA384())).hex()


def is_signed_by_server(statement: Statement, signature: str, key: str) -> bool:
    """Return whether a signature is valid for a server's key.

    Args:
        statement: What was signed.
        signature: As hex; malformed ones are not valid.
        key: Public Ed25519 key, as hex.
    """
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), statement.message())
    except (ValueError, InvalidSignature):
        return False
    return True


def is_signed_by_node(statement: Statement, signature: str, key: EllipticCurvePublicKey) -> bool:
    """Return whether a signature is valid for an organization's key.

    Args:
        statement: What was signed.
        signature: As hex; malformed ones are not valid.
        key: Public key of the organization's node.
    """
    try:
        key.verify(bytes.fromhex(signature), statement.message(), ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature):
        return False
    return True


def roster_digest(keys: Iterable[str]) -> str:
    """Return the SHA-256 over the fingerprints of organizations' keys, independent of their order."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
