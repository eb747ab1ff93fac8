"""Replace keys by a statement that names the new key, signed by the old key and, as proof of possession, by the new one.

An organization renews the key of its node, and gives the statement to the coordinator. A coordinator renews the key that signs
requests together with the certificate authority, and its statement reaches organizations with requests, or as a file. Neither
statement is secret. A thief of an old key could sign one, too: after a theft, revoke the key and invite the organization again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from cryptography.x509 import load_pem_x509_certificates
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cotune.errors import RunError
from cotune.protocol.statements import Statement, is_signed_by_node, is_signed_by_server, sign

MAX_SERVER_RENEWALS = 16  # the newest ones; an organization that knows none of their keys has to join again
_MAX_STATEMENT_LENGTH = 16 * 1024  # characters of a statement


@dataclass(frozen=True)
class NodeStatement(Statement):
    """The replacement of an organization's key.

    Attributes:
        federation: Its id.
        organization: Its name.
        old: `fingerprint` of the key that is replaced.
        new: The new key, a line in OpenSSH's format.
        at: When (UTC).
    """

    federation: str
    organization: str
    old: str
    new: str
    at: str


@dataclass(frozen=True)
class ServerStatement(Statement):
    """The replacement of a server's signing key and authority.

    Attributes:
        federation: Its id.
        old: The current Ed25519 key, as hex.
        new: The new Ed25519 key, as hex.
        authority: SHA-256 (hex) of the new authority's PEM.
        at: When (UTC).
    """

    federation: str
    old: str
    new: str
    authority: str
    at: str


class _Document(BaseModel):
    """A statement with both signatures.

    Attributes:
        statement: Its canonical text.
        signature: Of the old key.
        confirmation: Of the new key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    statement: str
    signature: str
    confirmation: str

    def text(self) -> str:
        """Return the document as one line of JSON."""
        return json.dumps(self.model_dump(), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a document without verifying its signatures; raises RunError if it is malformed."""
        try:
            if len(text) > _MAX_STATEMENT_LENGTH:
                raise ValueError
            return cls.model_validate_json(text)
        except (ValidationError, ValueError):
            raise RunError(
                "this is no statement of a renewed key: expected the file that the renewal has written",
                code="run.malformed_renewal",
            ) from None


class NodeRenewal(_Document):
    """The renewal of an organization's key."""

    @classmethod
    def make(cls, federation: str, organization: str, old: EllipticCurvePrivateKey, new: EllipticCurvePrivateKey) -> Self:
        """Create the statement of a renewal, and sign it with both keys.

        Args:
            federation: Id of the federation.
            organization: Its name.
            old: The node's current private key.
            new: The node's new private key.
        """
        statement = NodeStatement(federation, organization, fingerprint(old.public_key()), _to_openssh(new.public_key()), _now())
        return cls(statement=statement.text(), signature=sign(statement, old), confirmation=sign(statement, new))

    @property
    def about(self) -> NodeStatement:
        """Return the parsed statement; raises RunError if it is malformed."""
        return NodeStatement.parse(self.statement)

    def new_key(self) -> EllipticCurvePublicKey:
        """Return the new key; raises RunError if it is not a node's key in OpenSSH's format."""
        line = self.about.new
        try:
            key = load_ssh_public_key(line.encode())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, EllipticCurvePublicKey) or _to_openssh(key) != line:
            raise RunError(
                "the statement's new key is none of a node: expected one that `cotune client renew-key` has made",
                code="run.invalid_key",
            )
        return key

    def check(self, old: object) -> None:
        """Verify both signatures; raises RunError unless the key `old` and the new key have signed the statement."""
        if not isinstance(old, EllipticCurvePublicKey) or not is_signed_by_node(self.about, self.signature, old):
            raise RunError(
                "the statement is not signed by the organization's present key: expected its own; do not use the file",
                code="run.invalid_signature",
            )
        if not is_signed_by_node(self.about, self.confirmation, self.new_key()):
            raise RunError(
                "the statement is not signed by the new key that it names: expected both signatures; do not use the file",
                code="run.invalid_signature",
            )


class ServerRenewal(_Document):
    """The renewal of a federation's signing key and authority.

    Attributes:
        certificates: PEM of the new authority.
    """

    certificates: str = Field(max_length=8 * 1024)

    @classmethod
    def make(cls, federation: str, old: Ed25519PrivateKey, new: Ed25519PrivateKey, certificates: str) -> Self:
        """Create the statement of a renewal, and sign it with both keys.

        Args:
            federation: Id of the federation.
            old: The current private signing key.
            new: The new private signing key.
            certificates: PEM of the new authority.
        """
        present, following = (key.public_key().public_bytes_raw().hex() for key in (old, new))
        statement = ServerStatement(federation, present, following, _compute_digest(certificates), _now())
        signatures = {"signature": sign(statement, old), "confirmation": sign(statement, new)}
        return cls(statement=statement.text(), certificates=certificates, **signatures)

    @property
    def about(self) -> ServerStatement:
        """Return the parsed statement; raises RunError if it is malformed."""
        return ServerStatement.parse(self.statement)

    def check(self) -> None:
        """Verify both signatures and the authority; raises RunError unless they match the statement."""
        about = self.about
        if not is_signed_by_server(about, self.signature, about.old):
            raise RunError(
                "the statement of the server's new key is not signed by its old key: expected the federation's own",
                code="run.invalid_signature",
            )
        if not is_signed_by_server(about, self.confirmation, about.new):
            raise RunError(
                "the statement of the server's new key is not signed by that key: expected both signatures",
                code="run.invalid_signature",
            )
        try:
            count = len(load_pem_x509_certificates(self.certificates.encode()))
        except ValueError:
            count = 0
        if count != 1 or about.authority != _compute_digest(self.certificates):
            raise RunError(
                "the statement of the server's new key has another authority than the signed one: expected the signed one",
                code="run.other_authority",
            )

    @classmethod
    def parse_all(cls, text: str) -> list[Self]:
        """Parse the lines of a file, or of a request's record, the oldest first; raises RunError if one is malformed."""
        lines = text.split("\n", MAX_SERVER_RENEWALS)
        if "".join(lines[MAX_SERVER_RENEWALS:]).strip():
            raise RunError(
                f"these are more than {MAX_SERVER_RENEWALS} statements of renewed keys: expected the last ones",
                code="run.too_many_renewals",
            )
        return [cls.parse(line) for line in lines if line.strip()]

    @staticmethod
    def join(renewals: Sequence[ServerRenewal]) -> str:
        """Return the newest renewals as text for `parse_all`."""
        return "".join(f"{renewal.text()}\n" for renewal in renewals[-MAX_SERVER_RENEWALS:])


def read_node_renewal(file: Path) -> NodeRenewal:
    """Read the renewal of an organization's key; raises RunError if the file cannot be read or is malformed."""
    return NodeRenewal.parse(_read(file).strip())


def read_server_renewals(file: Path) -> list[ServerRenewal]:
    """Read a server's renewals, the oldest first; raises RunError if the file cannot be read or is malformed."""
    return ServerRenewal.parse_all(_read(file))


def _read(file: Path) -> str:
    try:
        with file.open(encoding="ascii") as stream:
            return stream.read(MAX_SERVER_RENEWALS * _MAX_STATEMENT_LENGTH)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise RunError(
            f"{file} cannot be read ({reason}): expected the statement of a renewed key", code="run.not_readable"
        ) from None


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """Return the SHA-256 (hex) of a node's key in Flower's format: PEM, SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _to_openssh(key: EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _compute_digest(certificates: str) -> str:
    return hashlib.sha256(certificates.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
