"""The key that signs a federation's requests, and their serial numbers.

Functions take the folder of certificates (`layout.CertificateFiles`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from cotune.errors import RunError
from cotune.server.deployment.layout import CertificateFiles
from cotune.storage.files import atomic_write, exclusive_lock


def create_signing_key(folder: Path) -> Ed25519PrivateKey:
    """Return the signing key of the folder; if there is none, create it with mode 0600.

    Raises:
        RunError: If the file cannot be read or written, or is not such a key.
    """
    file = CertificateFiles(folder).signing_key
    if file.exists():
        return read_signing_key(folder)
    key = Ed25519PrivateKey.generate()
    try:
        atomic_write(file, _to_pem(key))
    except OSError as error:
        raise RunError(
            f"{file} cannot be written ({error.strerror}): check the permissions of its folder", code="run.not_writable"
        ) from None
    return key


def read_signing_key(folder: Path) -> Ed25519PrivateKey:
    """Return the signing key of the folder.

    Raises:
        RunError: If there is none, or the file is not an Ed25519 key.
    """
    file = CertificateFiles(folder).signing_key
    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except FileNotFoundError:
        raise RunError(
            f"the federation has no key to sign its requests with ({file}), and organizations refuse what is not signed: make one"
            f" by `cotune server renew {folder.parent}`, and give the new federation.toml to every organization",
            code="run.no_signing_key",
        ) from None
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise RunError(
            f"{file} is not an unencrypted Ed25519 key in PEM: put back the file that was written there", code="run.invalid_key"
        )
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public half of a key as hex, as in federation.toml."""
    return key.public_key().public_bytes_raw().hex()


def public_keys(folder: Path) -> list[str]:
    """Return the public halves of the current and all former signing keys, as hex.

    Raises:
        RunError: As `read_signing_key`.
    """
    return list(dict.fromkeys((public_hex(read_signing_key(folder)), *_read_former(folder))))


def replace_signing_key(folder: Path, key: Ed25519PrivateKey) -> None:
    """Replace the signing key. The public half of the old one is kept, so that its signatures can still be verified.

    A process that is killed during the replacement leaves the old key; calling it again finishes the replacement.

    Raises:
        RunError: If a file cannot be read or written.
    """
    present = public_hex(read_signing_key(folder))
    following = public_hex(key)
    if present == following:
        return
    try:
        if present not in _read_former(folder):
            former = "".join(f"{each}\n" for each in (*_read_former(folder), present))
            atomic_write(CertificateFiles(folder).former_signing_keys, former.encode())
        atomic_write(CertificateFiles(folder).signing_key, _to_pem(key))
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}): check its permissions and space", code="run.not_writable"
        ) from None


def next_serial(folder: Path, now: Callable[[], float] = time.time) -> int:
    """Return the serial number of the next request, greater than all before; it is stored durably.

    It is the time in milliseconds since 1970, or the last number plus one if the clock was set back, so that a folder restored
    from a backup continues with numbers greater than those used since the backup.

    Raises:
        RunError: If the file is damaged or cannot be written.
    """
    file = CertificateFiles(folder).serial
    with exclusive_lock(file.with_name(f".{file.name}.lock")):
        try:
            last = int(file.read_bytes()) if file.exists() else 0
            serial = max(last + 1, int(now() * 1000))
            atomic_write(file, str(serial).encode())
        except OSError as error:
            raise RunError(
                f"{file} cannot be written ({error.strerror}): free space, or correct the permissions", code="run.not_writable"
            ) from None
        except ValueError:
            raise RunError(
                f"{file} is damaged: expected a number; remove it, and it starts again from the clock", code="run.damaged_file"
            ) from None
    return serial


def _read_former(folder: Path) -> list[str]:
    file = CertificateFiles(folder).former_signing_keys
    return file.read_text(encoding="ascii").split() if file.exists() else []


def _to_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
