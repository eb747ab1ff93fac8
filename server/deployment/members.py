"""The organizations of a federation: under which name and with which key each was invited. members.json in the federation's
folder.

A key belongs to one organization and an organization has one key: who takes part is known by the key alone, never by what
somebody says. Anyone who was revoked stays in the list, and so does a key that its organization has replaced
(protocol/key_renewal.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, SSHPublicKeyTypes, load_ssh_public_key
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from cotune.errors import PlanError, RunError
from cotune.protocol.federation_file import check_name
from cotune.protocol.key_renewal import NodeRenewal
from cotune.storage.files import exclusive_lock
from cotune.storage.json_documents import JsonDocument


class Member(BaseModel):
    """An organization that was invited.

    Attributes:
        name: Of the organization, and of its folders and files: it is checked again, as the list may be edited by hand.
        public_key: One line as OpenSSH writes it.
        invited: UTC.
        revoked: UTC; None: it may take part.
        examples: Between which numbers the number of records that it declares must be; None: any.
        renewed: The statement by which this key took the place of the one before, as JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    public_key: str
    invited: str
    revoked: str | None = None
    examples: tuple[int, int] | None = None
    renewed: str | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        try:
            return check_name(value)
        except PlanError as error:
            raise ValueError(str(error)) from None

    @property
    def loaded(self) -> SSHPublicKeyTypes:
        return load_ssh_public_key(self.public_key.encode())

    @property
    def key(self) -> bytes:
        """The public key as Flower keeps it: PEM, SubjectPublicKeyInfo."""
        return self.loaded.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the key, to be compared on another channel."""
        return hashlib.sha256(self.key).hexdigest()


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    members: tuple[Member, ...] = ()

    @model_validator(mode="after")
    def _check_distinct(self) -> _Document:
        for what in ("name", "key"):
            found = [getattr(member, what) for member in self.members if member.revoked is None]
            if len(set(found)) != len(found):
                raise ValueError(f"two members have one {what}")
        return self


class Members:
    """The list of members, in the order of their invitations. Every call reads it again: other processes change it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._document = JsonDocument(file, _Document, advice="expected the list of members; restore it from a backup")

    def all(self) -> tuple[Member, ...]:
        """Return all members, those that were revoked included. Raises RunError for a damaged file."""
        document = self._document.read()
        return () if document is None else document.members

    def active(self) -> tuple[Member, ...]:
        """Return the members that may take part. Raises RunError for a damaged file."""
        return tuple(member for member in self.all() if member.revoked is None)

    def invite(self, name: str, public_key: str, examples: tuple[int, int] | None = None) -> Member:
        """Add an organization. The same invitation again changes nothing.

        Args:
            name: Of the organization.
            public_key: One line as OpenSSH writes it.
            examples: Between which numbers the number of records that it declares must be.

        Raises:
            PlanError: If the name is not valid.
            RunError: If the name or the key is taken, also by a member that was revoked.
        """
        check_name(name)
        with self._locked():
            before = self.all()
            for member in before:
                if member.revoked is None and (member.name, member.public_key) == (name, public_key):
                    return self._replace(before, member.model_copy(update={"examples": examples or member.examples}))
                if member.public_key == public_key:
                    revoked = ", which was revoked" if member.revoked else ""
                    raise RunError(
                        f"this key is that of {member.name}{revoked}: expected another for {name}, made on its own machine",
                        code="run.key_in_use",
                    )
                if member.name == name and member.revoked is None:
                    raise RunError(
                        f"{name} has another key already: revoke it first (`cotune server revoke`)", code="run.name_in_use"
                    )
            added = Member(name=name, public_key=public_key, invited=_now(), examples=examples)
            self._write((*before, added))
            return added

    def renew(self, renewal: NodeRenewal, federation: str) -> Member:
        """Replace an organization's key by a new one; the old key is never let in again. The same again changes nothing.

        Args:
            renewal: The statement that names the new key, signed by both keys.
            federation: The id of this federation.

        Raises:
            RunError: If the statement is of another federation or organization or not signed by the present key, as one that is
                replayed, or if the new key is or was used by a member.
        """
        about = renewal.about
        new = renewal.new_key()
        with self._locked():
            before = self.all()
            for member in before:
                if member.revoked is None and member.renewed == renewal.text():
                    return member
            present = next((m for m in before if m.revoked is None and m.fingerprint == about.old), None)
            if present is None:
                raise RunError(
                    "the statement replaces a key that is no member's now: expected an organization's present key",
                    code="run.unknown_member",
                )
            renewal.check(present.loaded)
            if (about.federation, about.organization) != (federation, present.name):
                raise RunError(
                    f"the statement is of {about.organization[:80]!r} in federation {about.federation[:12]}: expected"
                    f" {present.name} in {federation[:12]}",
                    code="run.renewal_of_other_member",
                )
            taken = next((member for member in before if member.loaded == new), None)
            if taken is not None:
                raise RunError(
                    f"the new key is or was that of {taken.name}: expected one that was never used here", code="run.key_in_use"
                )
            added = present.model_copy(update={"public_key": about.new, "renewed": renewal.text()})
            former = present.model_copy(update={"revoked": _now()})
            place = before.index(present)  # it keeps its place: runs take their organizations in this order
            self._write((*before[:place], former, added, *before[place + 1 :]))
            return added

    def revoke(self, name: str) -> Member:
        """Shut an organization out; its key is never let in again. Raises RunError where there is no such member."""
        with self._locked():
            before = self.all()
            for member in before:
                if member.name == name and member.revoked is None:
                    return self._replace(before, member.model_copy(update={"revoked": _now()}))
        known = ", ".join(member.name for member in before if member.revoked is None) or "none so far"
        raise RunError(f"{name[:80]!r} is not a member: expected one of: {known}", code="run.unknown_member")

    def _replace(self, before: tuple[Member, ...], changed: Member) -> Member:
        self._write(tuple(changed if m.public_key == changed.public_key else m for m in before))
        return changed

    def _write(self, members: tuple[Member, ...]) -> None:
        self._document.write(_Document(members=members))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with exclusive_lock(self._file.with_suffix(".lock")):
            yield


def read_public_key(file: Path) -> str:
    """Return the key in a .pub file as `ssh-keygen -t ecdsa` or `cotune client init` writes it, without its comment.

    Raises:
        RunError: If the file cannot be read or holds another kind of key.
    """
    try:
        text = file.read_text(encoding="ascii").strip()
        key = load_ssh_public_key(text.encode())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey):
        raise RunError(
            f"{file} is not the public key of an organization: expected the file node.pub that `cotune client init` makes there",
            code="run.invalid_key",
        )
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
