"""Members with keys, and a SuperLink that registers their nodes."""

from __future__ import annotations

import itertools

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cotune.errors import RunError
from cotune.flower.nodes import RegisteredNode
from cotune.server.deployment.members import Member


def member(name: str) -> Member:
    key = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return Member(name=name, public_key=key.decode(), invited="2026-01-01")


MEMBERS = [member(name) for name in "abcd"]


class SuperLink:
    """What it knows; `down`: it does not answer."""

    def __init__(self, *keys: bytes) -> None:
        self._numbers = itertools.count(1)
        self.known = {key: next(self._numbers) for key in keys}
        self.online: set[bytes] = set()
        self.down = False

    def nodes(self) -> tuple[RegisteredNode, ...]:
        if self.down:
            raise RunError("the SuperLink cannot be reached")
        return tuple(RegisteredNode(number, key, key in self.online) for key, number in self.known.items())

    def register(self, key: bytes, name: str) -> int:
        assert key not in self.known, "Flower refuses that"
        self.known[key] = next(self._numbers)
        return self.known[key]

    def unregister(self, node: int) -> None:
        self.known = {key: number for key, number in self.known.items() if number != node}
