"""The organizations of a federation with their names and keys: members.json in the federation's folder.

A key belongs to one organization, and an organization has one key: a participant is identified only by its key, never by what it
states. Revoked members stay in the list, and so do keys that were replaced (protocol/key_renewal.py).
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
        name: Of the organization; also used for folders and files, so it is validated again, as the list may be edited by hand.
        public_key: One line in OpenSSH's format.
        invited: When (UTC).
        revoked: When (UTC); None: it may take part.
        examples: Smallest and largest number of records that it may declare; None: any.
        renewed: The statement by which this key replaced the previous one, as JSON.
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
        """The public key, parsed."""
        return load_ssh_public_key(self.public_key.encode())

    @property
    def key(self) -> bytes:
        """The public key in Flower's format: PEM, SubjectPublicKeyInfo."""
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
    """The list of members, in the order of their invitations. Every call reads the file, as other processes change it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._document = JsonDocument(file, _Document, advice="expected the list of members; restore it from a backup")

    def all(self) -> tuple[Member, ...]:
        """Return all members, including revoked ones; raises RunError if the file is damaged."""
        document = self._document.read()
        return () if document is None else document.members

    def active(self) -> tuple[Member, ...]:
        """Return the members that may take part; raises RunError if the file is damaged."""
        return tuple(member for member in self.all() if member.revoked is None)

    def invite(self, name: str, public_key: str, examples: tuple[int, int] | None = None) -> Member:
        """Add an organization. Repeating an invitation changes nothing.

        Args:
            name: Of the organization.
            public_key: One line in OpenSSH's format.
            examples: Smallest and largest number of records that it may declare; None: any.

        Raises:
            PlanError: If the name is not valid.
            RunError: If the name or the key belongs to another member, revoked or not.
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
        """Replace an organization's key; the old key is never accepted again. Repeating a renewal changes nothing.

        Args:
            renewal: The statement that names the new key, signed by both keys.
            federation: The id of this federation.

        Raises:
            RunError: If the statement is for another federation or organization, or is not signed by the current key (such as a
                replayed one), or if the new key is or was used by a member.
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
            place = before.index(present)  # the member keeps its position, as runs use this order
            self._write((*before[:place], former, added, *before[place + 1 :]))
            return added

    def revoke(self, name: str) -> Member:
        """Exclude an organization from the federation; its key is never accepted again.

        Raises:
            RunError: If there is no such member.
        """
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
    """Return the key in a .pub file of `ssh-keygen -t ecdsa` or `cotune client init`, without its comment.

    Raises:
        RunError: If the file cannot be read or contains another kind of key.
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
