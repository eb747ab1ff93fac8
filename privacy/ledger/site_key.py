"""The secret key under which a ledger identifies records: without it, nobody can test whether the ledger holds a guessed text."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from cotune.errors import PrivacyError
from cotune.storage.files import atomic_write

IDENTITY_BYTES = 16  # bytes of a keyed identity: collisions among millions of records stay out of reach
_KEY_BYTES = 32


class SiteKey:
    """HMAC-SHA256 under the key in a file beside the ledger."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def create(cls, path: Path, *, durable: bool = True) -> SiteKey:
        """Return the key in the file; where there is none, draw one and write it, readable by its owner only.

        durable: See `Ledger`.
        """
        if not path.exists():
            atomic_write(path, secrets.token_bytes(_KEY_BYTES), durable=durable)
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> SiteKey:
        """Return the key in the file.

        Raises:
            PrivacyError: When it is missing or damaged: no record could be recognized without it.
        """
        try:
            key = path.read_bytes()
        except OSError as error:
            raise _unusable(path, error.strerror or "it cannot be read") from None
        if len(key) != _KEY_BYTES:
            raise _unusable(path, f"it has {len(key)} bytes, not {_KEY_BYTES}")
        return cls(key)

    @property
    def check(self) -> str:
        """Return a text that identifies the key and reveals nothing else about it."""
        return self._keyed(b"cotune ledger key").hex()

    def identities(self, plain: Iterable[bytes]) -> list[bytes]:
        """Return a keyed identity of 16 bytes for each identity."""
        return [self._keyed(b"record\n" + identity)[:IDENTITY_BYTES] for identity in plain]

    def _keyed(self, message: bytes) -> bytes:
        return hmac.digest(self._key, message, hashlib.sha256)


def _unusable(path: Path, reason: str) -> PrivacyError:
    return PrivacyError(
        f"the key {path} of the privacy ledger cannot be used ({reason}): expected the file as cotune made it, as no record can"
        " be recognized without it and nothing is trained; restore it from a backup",
        code="privacy.ledger_key_unusable",
    )
