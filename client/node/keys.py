"""The keys by which servers know an organization's node: the present one, the next one, and how it is renewed.

node.key, node.pub      in the site: the present one
node/next.key           made by `cotune client renew-key`; takes the place of node.key once the server lets the node in with it
node/former.pub         the public halves of those that were replaced, one a line

A process that is killed between any two writes leaves the present key, or the next one in its place; the same again finishes it.

An organization renews the key by which servers know its node: a statement for the coordinator, signed by the old key.
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
    """The present one first, those before it, and one that is to follow. Raises RunError."""
    file = SitePaths(site).node.former_keys
    try:
        former = [load_ssh_public_key(line) for line in _lines(file)]
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise RunError(f"{file} is damaged ({type(error).__name__}): expected a public key in each line") from None
    present = read_private_key(SitePaths(site).private_key).public_key()
    return [present, *(key for key in former if isinstance(key, EllipticCurvePublicKey))]


def read_next_key(site: Path) -> EllipticCurvePrivateKey | None:
    """The key that is to follow, if one was made. Raises RunError."""
    file = _next(site)
    return read_private_key(file) if file.exists() else None


def get_renewal_keys(site: Path) -> tuple[EllipticCurvePrivateKey, EllipticCurvePrivateKey]:
    """The present key, and the one that is to follow it, made where there is none. Raises RunError."""
    with _changing(site):
        present = read_private_key(SitePaths(site).private_key)
        following = read_next_key(site)
        if following is None:
            following = ec.generate_private_key(ec.SECP384R1())
            atomic_write(_next(site), encode_private_key(following))
        return present, following


def activate_next_key(site: Path, key: EllipticCurvePrivateKey) -> None:
    """Puts the key that was to follow, and with which a server has let the node in, in the place of the present one.

    The former one is noted before it is gone, so that what it has signed can be verified; its private half is not kept.
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
    """node.pub, with the comment that it has, where it is another key's."""
    file = SitePaths(site).public_key
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    before = file.read_bytes() if file.exists() else b""
    if not before.startswith(line):
        comment = b" ".join(before.split()[2:])
        atomic_write(file, b" ".join((line, comment)).strip() + b"\n")


def encode_private_key(key: EllipticCurvePrivateKey) -> bytes:
    """As OpenSSH keeps it."""
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
    """Makes the next key, and the statement that the coordinator is to be given. The same again renews the same key.

    Until the coordinator has accepted it, the node goes on with the present key; from then on it uses the next one by itself.

    Returns:
        The statement's file, and the new key's fingerprint: SHA-256, hex.

    Raises:
        RunError: For a site that has joined no federation, keys that cannot be read, and a folder that cannot be written.
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
        raise RunError(f"{site.folder} cannot be written ({error.strerror}): make room, or mend its permissions") from None
    return file, fingerprint(following.public_key())


def _kept(file: Path, federation: str, new: str) -> NodeRenewal | None:
    """The statement that was made before, so that the coordinator is shown one and the same."""
    try:
        renewal = NodeRenewal.parse(file.read_text(encoding="ascii"))
        about = renewal.about
        return renewal if (about.federation, fingerprint(renewal.new_key())) == (federation, new) else None
    except (OSError, ValueError, RunError):
        return None
