"""The files by which a node and its server know each other."""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from cotune.models.errors import RunError


def read_private_key(file: Path) -> EllipticCurvePrivateKey:
    """Raises RunError, also where others may read the file."""
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise RunError(f"{file} is not a key for a node: expected a private key as `ssh-keygen -t ecdsa -b 384 -N ''` makes it")
    if file.stat().st_mode & 0o077:
        raise RunError(f"the private key {file} is open to others: expected a file for its owner alone; run `chmod 600 {file}`")
    return key


def read_certificates(file: Path | None) -> bytes | None:
    """PEM; None where no file is given. Raises RunError."""
    if file is None:
        return None
    try:
        content = file.read_bytes()
        ssl.create_default_context(cadata=content.decode("ascii"))
    except (OSError, ValueError, ssl.SSLError):
        raise RunError(f"{file} holds no certificates: expected the server's ca.crt, in PEM") from None
    return content
