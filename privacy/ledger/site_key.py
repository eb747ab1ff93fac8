"""The secret under which a ledger knows records: without it, guessing a text does not tell whether the ledger knows it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from cotune.errors import PrivacyError
from cotune.storage.files import atomic_write

IDENTITY = 16  # bytes of a keyed identity: collisions among millions of records stay out of reach
_KEY = 32  # bytes


class SiteKey:
    """HMAC-SHA256 under the key in a file beside the ledger."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def made(cls, path: Path) -> SiteKey:
        """The key in the file, which is drawn and written durably where there is none; readable by its owner only."""
        if not path.exists():
            atomic_write(path, secrets.token_bytes(_KEY))
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> SiteKey:
        """Raises PrivacyError where the key is gone or damaged: no record could be recognized without it."""
        try:
            key = path.read_bytes()
        except OSError as error:
            raise _unusable(path, error.strerror or "it cannot be read") from None
        if len(key) != _KEY:
            raise _unusable(path, f"it has {len(key)} bytes, not {_KEY}")
        return cls(key)

    @property
    def check(self) -> str:
        """Tells whether a key is the one that a ledger was begun with, and nothing else about it."""
        return self._keyed(b"cotune ledger key").hex()

    def identities(self, plain: Iterable[bytes]) -> list[bytes]:
        """A keyed identity of 16 bytes for each identity."""
        return [self._keyed(b"record\n" + identity)[:IDENTITY] for identity in plain]

    def _keyed(self, message: bytes) -> bytes:
        return hmac.digest(self._key, message, hashlib.sha256)


def _unusable(path: Path, reason: str) -> PrivacyError:
    return PrivacyError(
        f"the key {path} of the privacy ledger cannot be used ({reason}): expected the file as cotune made it, as no record can"
        " be recognized without it and nothing is trained; restore it from a backup",
        code="privacy.ledger_key_unusable",
    )
