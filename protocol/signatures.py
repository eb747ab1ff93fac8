"""Signatures in messages: a record of the message holds the statement, the signature and what it is about."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from cotune.errors import RunError
from cotune.protocol.statements import Statement

SIGNED = "signed"  # the name of the record that holds a signature, in a request and in a reply


@dataclass(frozen=True)
class Signed:
    """A statement and its signature as a message contains them.

    Attributes:
        text: The statement's canonical text.
        signature: As hex.
        about: The record's other fields, such as the roster.
    """

    text: str
    signature: str
    about: dict[str, str]


def attach(content: RecordDict, statement: Statement, signature: str, **about: str) -> None:
    """Add a signature to a message, replacing an existing one.

    Args:
        content: The message, which is changed in place.
        statement: What was signed.
        signature: As hex.
        **about: Further fields of the record.
    """
    content[SIGNED] = ConfigRecord({**about, "statement": statement.text(), "signature": signature})


def detach(content: RecordDict) -> tuple[RecordDict, Signed | None]:
    """Separate a message from its signature.

    Returns:
        (the message without its signature, the signature or None).

    Raises:
        RunError: If the signature is malformed.
    """
    rest = RecordDict({name: record for name, record in content.items() if name != SIGNED})
    if SIGNED not in content:
        return rest, None
    record = content[SIGNED]
    values = dict(record) if isinstance(record, ConfigRecord) else {}
    about = {name: value for name, value in values.items() if isinstance(value, str)}
    if "statement" not in about or "signature" not in about:
        raise RunError(
            "received a message with a malformed signature: expected the texts statement and signature",
            code="run.malformed_signature",
        )
    return rest, Signed(about.pop("statement"), about.pop("signature"), about)


def content_digest(content: RecordDict) -> str:
    """Return the SHA-256 over every record's name and kind, and the names and values in it."""
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
