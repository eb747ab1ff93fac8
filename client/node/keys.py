"""The keys by which servers identify an organization's node: the current one, the next one, and the former ones.

node.key, node.pub      in the site: the current key
node/next.key           created by `cotune client renew-key`; replaces node.key once the server accepts it
node/former.pub         the public halves of replaced keys, one per line

A process that is killed between any two writes leaves either the current or the next key in use; repeating the call finishes the
renewal. The coordinator receives a new key in a statement that the old key has signed.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)

from cotune.client.node.trust import Trust
from cotune.client.site import Site
from cotune.client.site_folder import SitePaths
from cotune.client.site_setup import read_private_key
from cotune.errors import RunError
from cotune.protocol.key_renewal import NodeRenewal, fingerprint
from cotune.storage.files import atomic_write, exclusive_lock


def read_public_keys(site: Path) -> list[EllipticCurvePublicKey]:
    """Return the current public key, then the former ones; raises RunError if one cannot be read."""
    file = SitePaths(site).node.former_keys
    try:
        former = [load_ssh_public_key(line) for line in _lines(file)]
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise RunError(
            f"{file} is damaged ({type(error).__name__}): expected a public key in each line", code="run.damaged_document"
        ) from None
    present = read_private_key(SitePaths(site).private_key).public_key()
    return [present, *(key for key in former if isinstance(key, EllipticCurvePublicKey))]


def read_next_key(site: Path) -> EllipticCurvePrivateKey | None:
    """Return the next key, if there is one; raises RunError if it cannot be read."""
    file = _next(site)
    return read_private_key(file) if file.exists() else None


def get_renewal_keys(site: Path) -> tuple[EllipticCurvePrivateKey, EllipticCurvePrivateKey]:
    """Return the current key and the next one, which is created if there is none; raises RunError if that fails."""
    with _changing(site):
        present = read_private_key(SitePaths(site).private_key)
        following = read_next_key(site)
        if following is None:
            following = ec.generate_private_key(ec.SECP384R1())
            atomic_write(_next(site), encode_private_key(following))
        return present, following


def activate_next_key(site: Path, key: EllipticCurvePrivateKey) -> None:
    """Replace the current key by the next one, after a server has accepted it.

    The public half of the old key is stored first, so that its signatures can be verified; its private half is not kept.
    """
    with _changing(site):
        following = read_next_key(site)
        if following is None or following.public_key() != key.public_key():
            return  # another process has done it
        present = read_private_key(SitePaths(site).private_key).public_key()
        file = SitePaths(site).node.former_keys
        line = present.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        lines = _lines(file)
        if line not in lines:
            atomic_write(file, b"".join(each + b"\n" for each in (*lines, line)))
        os.replace(_next(site), SitePaths(site).private_key)
        write_public_key(site, key)


def write_public_key(site: Path, key: EllipticCurvePrivateKey) -> None:
    """Write node.pub if it contains another key, keeping its comment."""
    file = SitePaths(site).public_key
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    before = file.read_bytes() if file.exists() else b""
    if not before.startswith(line):
        comment = b" ".join(before.split()[2:])
        atomic_write(file, b" ".join((line, comment)).strip() + b"\n")


def encode_private_key(key: EllipticCurvePrivateKey) -> bytes:
    """Encode a private key in OpenSSH's format."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _next(site: Path) -> Path:
    return SitePaths(site).node.next_key


def _lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines() if file.exists() else []


def _changing(site: Path) -> AbstractContextManager[None]:
    node = SitePaths(site).node
    node.create()
    return exclusive_lock(node.keys_lock)


def renew_key(site: Site) -> tuple[Path, str]:
    """Create the next key, and the statement for the coordinator. Repeating the call renews the same key.

    The node uses the current key until the coordinator has accepted the new one, then switches automatically.

    Returns:
        (the statement's file, the new key's fingerprint: SHA-256, hex).

    Raises:
        RunError: If the site has joined no federation, a key cannot be read, or the folder cannot be written.
    """
    federation = Trust.read(site.folder).federation
    file = site.key_renewal
    try:
        present, following = get_renewal_keys(site.folder)
        renewal = _kept(file, federation, fingerprint(following.public_key()))
        if renewal is None:
            renewal = NodeRenewal.make(federation, site.organization, present, following)
            atomic_write(file, renewal.text().encode() + b"\n")
    except OSError as error:
        raise RunError(
            f"{site.folder} cannot be written ({error.strerror}): free space, or correct its permissions", code="run.not_writable"
        ) from None
    return file, fingerprint(following.public_key())


def _kept(file: Path, federation: str, new: str) -> NodeRenewal | None:
    """Return the existing statement for the key, so that the coordinator always receives the same one."""
    try:
        renewal = NodeRenewal.parse(file.read_text(encoding="ascii"))
        about = renewal.about
        return renewal if (about.federation, fingerprint(renewal.new_key())) == (federation, new) else None
    except (OSError, ValueError, RunError):
        return None
