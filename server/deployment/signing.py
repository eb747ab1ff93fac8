"""The key that signs a federation's requests, and the number that each of them has.

certificates/signing.key    Ed25519, PEM; its public half is in federation.toml
certificates/signing-former.pub    the public halves of those that were replaced, as hex, one a line
certificates/serial         the last number that was given to a request: none is given twice, nor a smaller one later
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from cotune.errors import RunError
from cotune.storage.files import atomic_write, exclusive_lock

SIGNING_KEY = "signing.key"
FORMER = "signing-former.pub"
_SERIAL = "serial"


def create_signing_key(folder: Path, name: str = SIGNING_KEY) -> Ed25519PrivateKey:
    """The key in the folder, made where there is none, with mode 0600. Raises RunError."""
    if (folder / name).exists():
        return read_signing_key(folder, name)
    key = Ed25519PrivateKey.generate()
    try:
        atomic_write(folder / name, _key_bytes(key))
    except OSError as error:
        raise RunError(f"{folder / name} cannot be written ({error.strerror}): check the permissions of its folder") from None
    return key


def read_signing_key(folder: Path, name: str = SIGNING_KEY) -> Ed25519PrivateKey:
    """Raises RunError."""
    file = folder / name
    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except FileNotFoundError:
        raise RunError(
            f"the federation has no key to sign its requests with ({file}), and organizations refuse what is not signed: make one"
            f" by `cotune server renew {folder.parent}`, and give the new federation.toml to every organization"
        ) from None
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise RunError(f"{file} is not an unencrypted Ed25519 key in PEM: put back the file that was written there")
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half, as federation.toml has it."""
    return key.public_key().public_bytes_raw().hex()


def public_keys(folder: Path) -> list[str]:
    """The present signing key and those before it, as hex. Raises RunError."""
    return list(dict.fromkeys((public_hex(read_signing_key(folder)), *_former(folder))))


def replace_signing_key(folder: Path, key: Ed25519PrivateKey) -> None:
    """Puts a key in the place of the present one, whose public half is noted before, so that what it has signed can be verified.

    Killed in between it leaves the present key; the same again finishes it. Raises RunError.
    """
    present = public_hex(read_signing_key(folder))
    following = public_hex(key)
    if present == following:
        return
    try:
        if present not in _former(folder):
            atomic_write(folder / FORMER, "".join(f"{each}\n" for each in (*_former(folder), present)).encode())
        atomic_write(folder / SIGNING_KEY, _key_bytes(key))
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}): check its permissions and space") from None


def _former(folder: Path) -> list[str]:
    file = folder / FORMER
    return file.read_text(encoding="ascii").split() if file.exists() else []


def _key_bytes(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def next_serial(folder: Path, now: Callable[[], float] = time.time) -> int:
    """A number greater than every one before, durably: milliseconds since 1970, as a clock that is put back must not repeat one.

    A folder that was restored from a backup goes on beyond what the backup has seen. Raises RunError for a damaged file.
    """
    file = folder / _SERIAL
    with exclusive_lock(folder / f".{_SERIAL}.lock"):
        try:
            last = int(file.read_bytes()) if file.exists() else 0
            serial = max(last + 1, int(now() * 1000))
            atomic_write(file, str(serial).encode())
        except OSError as error:
            raise RunError(f"{file} cannot be written ({error.strerror}): make room, or mend the permissions") from None
        except ValueError:
            raise RunError(f"{file} is damaged: expected a number; remove it, and it begins anew from the clock") from None
    return serial
