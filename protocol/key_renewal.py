"""A key is replaced: the statement that names the new key, signed by the old one and, as proof that it is had, by the new one.

An organization renews the key of its node, and gives the statement to the coordinator; a coordinator renews the key that signs
requests, with the certificate authority, and its statement reaches organizations beside requests, or as a file. Neither statement
is secret. Anyone who has stolen an old key could sign one too: after a theft a key is revoked, and an invitation made again.
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
from cotune.protocol.signatures import Statement, is_signed_by_node, is_signed_by_server, sign

MAX_SERVER_RENEWALS = 16  # the last ones: anyone who knows none of their keys joins again
_MAX_STATEMENT_LENGTH = 16 * 1024  # characters of one


@dataclass(frozen=True)
class NodeStatement(Statement):
    """The replacement of an organization's key.

    Attributes:
        federation: Its id.
        organization: Its name.
        old: `fingerprint` of the key that is replaced.
        new: The new key, a line as OpenSSH writes it.
        at: UTC.
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
        old: The present Ed25519 key, as hex.
        new: The new one, as hex.
        authority: SHA-256 (hex) of the new authority's PEM.
        at: UTC.
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
        """Parse a document, without checking its signatures. Raises RunError where it is malformed."""
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
        statement = NodeStatement(federation, organization, fingerprint(old.public_key()), _to_openssh(new.public_key()), _now())
        return cls(statement=statement.text(), signature=sign(statement, old), confirmation=sign(statement, new))

    @property
    def about(self) -> NodeStatement:
        """Raises RunError."""
        return NodeStatement.parse(self.statement)

    def new_key(self) -> EllipticCurvePublicKey:
        """Return the new key. Raises RunError where it is not a node's, or not written as OpenSSH writes it."""
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
        """Check both signatures. Raises RunError unless the key `old` and the new key have signed the statement."""
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
        certificates: PEM of the one new authority.
    """

    certificates: str = Field(max_length=8 * 1024)

    @classmethod
    def make(cls, federation: str, old: Ed25519PrivateKey, new: Ed25519PrivateKey, certificates: str) -> Self:
        present, following = (key.public_key().public_bytes_raw().hex() for key in (old, new))
        statement = ServerStatement(federation, present, following, _compute_digest(certificates), _now())
        signatures = {"signature": sign(statement, old), "confirmation": sign(statement, new)}
        return cls(statement=statement.text(), certificates=certificates, **signatures)

    @property
    def about(self) -> ServerStatement:
        """Raises RunError."""
        return ServerStatement.parse(self.statement)

    def check(self) -> None:
        """Check both signatures and the authority. Raises RunError unless they are those that the statement names."""
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
                "the statement of the server's new key came with another authority than was signed: expected that one",
                code="run.other_authority",
            )

    @classmethod
    def parse_all(cls, text: str) -> list[Self]:
        """Parse the lines of a file, or of what comes with a request, the oldest first. Raises RunError."""
        lines = text.split("\n", MAX_SERVER_RENEWALS)
        if "".join(lines[MAX_SERVER_RENEWALS:]).strip():
            raise RunError(
                f"these are more than {MAX_SERVER_RENEWALS} statements of renewed keys: expected the last ones",
                code="run.too_many_renewals",
            )
        return [cls.parse(line) for line in lines if line.strip()]

    @staticmethod
    def join(renewals: Sequence[ServerRenewal]) -> str:
        """Return the newest renewals as `parse_all` reads them."""
        return "".join(f"{renewal.text()}\n" for renewal in renewals[-MAX_SERVER_RENEWALS:])


def read_node_renewal(file: Path) -> NodeRenewal:
    """Read the renewal of an organization's key. Raises RunError where the file cannot be read or is malformed."""
    return NodeRenewal.parse(_read(file).strip())


def read_server_renewals(file: Path) -> list[ServerRenewal]:
    """Read a server's renewals, the oldest first. Raises RunError where the file cannot be read or is malformed."""
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
    """Return the SHA-256 (hex) of a node's key as Flower keeps it: PEM, SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _to_openssh(key: EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _compute_digest(certificates: str) -> str:
    return hashlib.sha256(certificates.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
