"""What a server has asked of an organization, and what was answered, as statements that are signed and can be shown to others.

A server signs each request with the federation's Ed25519 key (RFC 8032), whose public half is in federation.toml; an organization
signs each answer with the ECDSA key by which the server knows its node. A statement is JSON with sorted keys and without spaces:
one text for one content. Its kind is signed with it, so that a signature of one kind is none of another.
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
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from cotune.errors import RunError

# kinds of request
TRAIN = "train"
FINISHED = "finished"
# kinds of reply
UPDATE = "update"
RECEIPT = "receipt"
REFUSAL = "refusal"
SIGNED = "signed"  # the name of the record that holds a signature, in a request and in a reply
_LONGEST = 4096  # characters of a statement


@dataclass(frozen=True)
class Statement:
    """What is signed. The names of its fields are those of the JSON."""

    def text(self) -> str:
        """The canonical form: without the fields that have their defaults, which came later than the others."""
        default = {field.name: field.default for field in fields(self)}
        found = {name: value for name, value in asdict(self).items() if value != default[name]}
        return json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, by which an answer names what it answers."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def message(self) -> bytes:
        """The bytes that are signed."""
        return b"cotune " + type(self).__name__.encode() + b" 1\0" + self.text().encode()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises RunError for anything but the canonical text of such a statement."""
        try:
            found = json.loads(text) if len(text) <= _LONGEST else {}
            known = [field for field in fields(cls) if field.default is MISSING or field.name in found]
            statement = cls(**{field.name: _typed(found[field.name], str(field.type)) for field in known})
        except (ValueError, TypeError, KeyError, RecursionError):
            statement = None
        if statement is None or statement.text() != text:
            raise RunError(f"a signature came with {text!r:.80}: expected the canonical text of a {cls.__name__}")
        return statement


@dataclass(frozen=True)
class RequestStatement(Statement):
    """What decides about a request.

    federation, run, plan: ids. kind: `TRAIN` or `FINISHED`. admitted: as in the request. received: `received_digest` of its
    arrays. cohort, roster: how many took part in the round before, and `roster_digest` of their keys. serial: greater than that
    of every earlier request of the federation. at: UTC, to the second. least, most: between which numbers of records the
    recipient's declared one must be, as it was invited; most = 0: there is none. refused: why an update of it was last not taken
    into the model; "" where none was refused. strikes: how many it has.
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
        """Between which numbers the recipient's declared number of records must be; None: whatever the plan allows."""
        return (self.least, self.most) if self.most else None


@dataclass(frozen=True)
class ReplyStatement(Statement):
    """An answer: to which request (its digest), from whom, of which kind, and the `content_digest` of what it holds; of a refusal
    the `refusal_digest`.

    trusts: the newest signing key of the server that the organization knows, as hex.
    """

    request: str
    sender: str
    kind: str
    sha256: str
    trusts: str


@dataclass(frozen=True)
class Signed:
    """A statement's text and its signature, both as they travel. about: what else is in the record, such as the roster."""

    text: str
    signature: str
    about: dict[str, str]


def _typed(value: Any, kind: str) -> Any:
    if type(value).__name__ != kind:
        raise TypeError(kind)
    return value


def sign(statement: Statement, key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> str:
    """The signature, as hex."""
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(statement.message()).hex()
    return key.sign(statement.message(), ECDSA(hashes.SHA384())).hex()


def is_signed_by_server(statement: Statement, signature: str, key: str) -> bool:
    """Whether the signature is of the Ed25519 key (hex)."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), statement.message())
    except (ValueError, InvalidSignature):
        return False
    return True


def is_signed_by_node(statement: Statement, signature: str, key: EllipticCurvePublicKey) -> bool:
    """Whether the signature is of an organization's key."""
    try:
        key.verify(bytes.fromhex(signature), statement.message(), ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature):
        return False
    return True


def attach(content: RecordDict, statement: Statement, signature: str, **about: str) -> None:
    """Puts a signature into a message, in place of one that is there."""
    content[SIGNED] = ConfigRecord({**about, "statement": statement.text(), "signature": signature})


def detach(content: RecordDict) -> tuple[RecordDict, Signed | None]:
    """A message without its signature, and the signature; None where it has none. Raises RunError for one that is malformed."""
    rest = RecordDict({name: record for name, record in content.items() if name != SIGNED})
    if SIGNED not in content:
        return rest, None
    record = content[SIGNED]
    values = dict(record) if isinstance(record, ConfigRecord) else {}
    about = {name: value for name, value in values.items() if isinstance(value, str)}
    if "statement" not in about or "signature" not in about:
        raise RunError("a message came with a malformed signature: expected the texts statement and signature")
    return rest, Signed(about.pop("statement"), about.pop("signature"), about)


def refusal_digest(words: str) -> str:
    """SHA-256 of what a refusal says."""
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def dump_refusal(words: str, statement: Statement, signature: str) -> str:
    """A refusal under its signature, as one text: Flower's errors hold nothing else."""
    return json.dumps({"words": words, "statement": statement.text(), "signature": signature})


def parse_refusal(text: str) -> tuple[str, Signed | None]:
    """What a refusal says, and its signature; None where it has none, as of a node that could not read the request."""
    try:
        found = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        return text, None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("words", "statement", "signature")):
        return text, None
    return found["words"], Signed(found["statement"], found["signature"], {})


def roster_digest(keys: Iterable[str]) -> str:
    """SHA-256 over the fingerprints of organizations' keys: the same in any order."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def content_digest(content: RecordDict) -> str:
    """SHA-256 over every record's name and kind, and the names and values in it."""
    digest = hashlib.sha256()
    for name, record in sorted(content.items()):
        digest.update(f"{name}:{type(record).__name__}\n".encode())
        if isinstance(record, ArrayRecord):
            for key, array in sorted(record.items()):
                digest.update(f"{key}:{array.dtype}:{tuple(array.shape)}\n".encode())
                digest.update(array.data)
        else:
            digest.update("".join(f"{key}:{record[key]!r}\n" for key in sorted(record)).encode())
    return digest.hexdigest()
