"""federation.toml: the invitation that a coordinator sends to every organization, with which it can inspect the plan and join.

It contains no secrets. Anyone who alters it in transit can name another server, so it must be sent over a channel that both sides
trust, or its SHA-256 (`fingerprint`) must be compared.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any, Self

import tomli_w
from cryptography.x509 import load_pem_x509_certificates
from pydantic import Field, ValidationError, field_validator

from cotune.errors import PlanError, RunError
from cotune.plan.load import dump_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.protocol.version import PROTOCOL
from cotune.storage.config_table import ConfigTable, format_validation_error
from cotune.storage.json_documents import parse_toml

_FORMAT = 1
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})", re.ASCII)


class Server(ConfigTable):
    """The `server` table: the server to join."""

    address: str = Field(description="host:port of the coordinator's public port")
    certificates: str = Field(description="PEM: the authority that vouches for the server")
    signing_key: str = Field(pattern=r"^[0-9a-f]{64}$", description="hex: the Ed25519 key that signs what it asks for")

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str) -> str:
        found = _ADDRESS.fullmatch(value)
        if found is None or not 1 <= int(found[3]) <= 65535:
            raise ValueError("expected host:port, as in fed.example.org:9092")
        return value

    @field_validator("certificates")
    @classmethod
    def _check_certificates(cls, value: str) -> str:
        try:
            load_pem_x509_certificates(value.encode())
        except ValueError:
            raise ValueError("expected certificates in PEM") from None
        return value


class Document(ConfigTable):
    """The document without its plan."""

    format: int = Field(description="of this file")
    protocol: int = Field(description="of the messages; the same everywhere")
    name: str = Field(max_length=100, description="name of the federation")
    id: str = Field(pattern=r"^[0-9a-f]{32}$", description="of the federation: what it signs holds for no other")
    server: Server

    @field_validator("name")
    @classmethod
    def _check_printable(cls, value: str) -> str:
        """Refuse control characters: the value is printed to terminals, which interpret them."""
        if not value.isprintable():
            raise ValueError("expected printable characters only")
        return value


class Invitation:
    """A federation, as its invitation describes it.

    Args:
        name: Of the federation.
        address: host:port of the coordinator's public port.
        certificates: PEM of the authority.
        plan: The plan.
        id: Of the federation.
        signing_key: Of the server, as hex.

    Raises:
        PlanError: If one of them is not valid.
    """

    def __init__(self, name: str, address: str, certificates: str, plan: Plan, *, id: str, signing_key: str) -> None:
        self.plan = plan
        self._document = _validate(
            {
                "format": _FORMAT,
                "protocol": PROTOCOL,
                "name": name,
                "id": id,
                "server": {"address": address, "certificates": certificates, "signing_key": signing_key},
            }
        )

    @property
    def name(self) -> str:
        """The federation's name."""
        return self._document.name

    @property
    def address(self) -> str:
        """host:port of the coordinator's public port."""
        return self._document.server.address

    @property
    def certificates(self) -> bytes:
        """PEM of the authority."""
        return self._document.server.certificates.encode()

    @property
    def id(self) -> str:
        """The federation's id."""
        return self._document.id

    @property
    def signing_key(self) -> str:
        """The server's public signing key, as hex."""
        return self._document.server.signing_key

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the document, determined by server, authority, signing key and plan."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()

    def to_toml(self) -> str:
        """Return the content of federation.toml."""
        return tomli_w.dumps(self._document.model_dump(), multiline_strings=True) + "\n[plan]\n" + _dump_plan_table(self.plan)

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Parse the content of a federation.toml; raises PlanError if it is not valid."""
        try:
            table = parse_toml(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(
                f"the federation.toml is not valid TOML ({error}): get it from the coordinator again", code="plan.not_toml"
            ) from None
        plan = table.pop("plan", None)
        if not isinstance(plan, dict):
            raise PlanError("the federation.toml has no plan: get it from the coordinator again", code="plan.missing_plan")
        document = _validate(table)
        server = document.server
        about = {"id": document.id, "signing_key": server.signing_key}
        return cls(document.name, server.address, server.certificates, parse_plan(plan), **about)


def read_invitation(file: Path) -> Invitation:
    """Read a federation.toml.

    Raises:
        RunError: If the file cannot be read.
        PlanError: If it is not a federation.toml of this protocol.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file} cannot be read ({error}): expected the federation.toml that the coordinator gave you",
            code="run.not_readable",
        ) from None
    return Invitation.from_toml(text)


def _validate(table: dict[str, Any]) -> Document:
    protocol = table.get("protocol")
    if table.get("format") == _FORMAT and isinstance(protocol, int) and protocol != PROTOCOL:
        raise PlanError(
            f"the federation.toml is for protocol {protocol}, and this cotune speaks {PROTOCOL}: use the same cotune everywhere",
            code="plan.other_protocol",
        )
    try:
        document = Document.model_validate(table)
    except ValidationError as error:
        raise PlanError(format_validation_error(error, Document, "federation.toml"), code="plan.invalid_invitation") from None
    if document.format != _FORMAT:
        raise PlanError(
            f"the federation.toml has the format {document.format}, expected {_FORMAT}: use the same cotune everywhere",
            code="plan.other_format",
        )
    return document


def _dump_plan_table(plan: Plan) -> str:
    """Return the plan as a TOML table named plan."""
    nested = tomli_w.dumps({"plan": tomllib.loads(dump_plan(plan))})
    return nested.removeprefix("[plan]\n")


_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


def check_name(name: str) -> str:
    """Return the name of an organization if it is valid: 1 to 63 letters a to z, digits and hyphens, as in host names.

    It is used for folders and files, and shown to people.

    Raises:
        PlanError: If it is not valid.
    """
    if not _NAME.fullmatch(name):
        raise PlanError(
            f"{name[:80]!r} cannot be the name of an organization: expected 1 to 63 small letters, digits and hyphens, such as"
            " hospital-a",
            code="plan.invalid_name",
        )
    return name
