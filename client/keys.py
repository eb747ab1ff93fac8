"""The keys by which servers know an organization's node: the present one, and those before it.

node.key, node.pub      in the site: the present one
node/former.pub         the public halves of those that were replaced, one a line
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from cotune.client.credentials import read_private_key
from cotune.models.errors import RunError

__all__ = ["FORMER", "public_keys"]

FORMER = "former.pub"  # in node/


def public_keys(site: Path) -> list[EllipticCurvePublicKey]:
    """The present one first. Raises RunError."""
    file = site / "node" / FORMER
    try:
        lines = file.read_bytes().splitlines() if file.exists() else []
        former = [load_ssh_public_key(line) for line in lines]
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise RunError(f"{file} is damaged ({type(error).__name__}): expected a public key in each line") from None
    present = read_private_key(site / "node.key").public_key()
    return [present, *(key for key in former if isinstance(key, EllipticCurvePublicKey))]
