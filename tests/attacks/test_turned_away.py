"""What a node is told that the front turns away: whichever limit or check it was, its own reason, in one sentence.

On commit a605cba a node before full slots was told that the server "does not speak TLS", one that sent too much "status 413", and
one that was revoked that its clock may be wrong: what the front had said of it was thrown away. The node's own calls, over TLS, to
the real front.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient

from cotune.flower import fleet_errors
from cotune.flower.fleet_client import connect
from cotune.flower.fleet_errors import FleetError, NodeRejected
from cotune.server.deployment.members import Members
from tests.support.calls import new_key
from tests.support.proxies import NORTH, STRANGER, Running, Upstream, folder, running, served, upstream

__all__ = ["folder", "upstream"]  # fixtures


def told(front: Running, key: EllipticCurvePrivateKey, kind: type[Exception] = FleetError) -> str:
    with pytest.raises(kind) as raised, connect(f"localhost:{front.port}", (front.folder / "ca.crt").read_bytes(), key):
        pass
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert "TLS" not in sentence
    return sentence


def test_a_stranger(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port) as front:
        assert "is not that of a member" in told(front, STRANGER, NodeRejected)


def test_a_member_that_was_revoked_is_not_sent_to_its_clock(tmp_path: Path, folder: Path, upstream: Upstream) -> None:
    import shutil

    members = Members(tmp_path / "members.json")
    key = new_key()
    shutil.copytree(folder, tmp_path / "certificates")
    members.invite("west", key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
    members.revoke("west")
    with running(tmp_path / "certificates", upstream.port) as front:
        sentence = told(front, key, NodeRejected)
    assert "is not that of a member" in sentence
    assert "clock" not in sentence


def test_full_slots_of_a_member(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, connections_per_member=1) as front, ExitStack() as held:
        served(held.enter_context(front.connect()))
        assert "north hold 1 connections already" in told(front, NORTH)


def test_full_slots_of_an_address(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, connections_per_address=1) as front, ExitStack() as held:
        served(held.enter_context(front.connect()))
        authority = (front.folder / "ca.crt").read_bytes()
        with pytest.raises(FleetError) as raised, connect(f"localhost:{front.port}", authority, NORTH):
            pass
    assert "as many connections from this address as it allows" in str(raised.value)
    assert "does not speak TLS" not in str(raised.value)


def test_too_many_bytes(folder: Path, upstream: Upstream) -> None:
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    with running(folder, upstream.port, push_object=1000) as front:
        authority = (front.folder / "ca.crt").read_bytes()
        signing = NodeAuthHttpInterceptor(NORTH, NORTH.public_key())
        with FleetHttpClient.from_server_address(f"localhost:{front.port}", False, authority, interceptors=[signing]) as client:
            request = PushObjectRequest(node=Node(node_id=1), object_content=bytes(5000))
            with pytest.raises(FleetError, match="expected at most 1000"):
                fleet_errors.call(client.PushObject, request)


@pytest.mark.parametrize("status", [400, 401, 412, 413, 503])
@pytest.mark.parametrize(
    "detail",
    ["a: b\x1b[2J\u202ec\r\n d", 10_000 * "x: ", ["no text"], {"detail": "a: b"}, None],
    ids=["controls", "long", "list", "table", "none"],
)
def test_a_reason_is_shown_as_one_short_line_whatever_it_is(status: int, detail: object) -> None:
    """The server is not trusted, and the reason goes to the organization's terminal."""
    shown = str(fleet_errors._build_error(httpx.Response(status, content=json.dumps({"detail": detail}))))
    assert shown.isprintable()
    assert len(shown) < 600


@pytest.mark.parametrize("make", [lambda: b"", lambda: b"[" * 100_000, lambda: b"\xff", lambda: b"5"])
def test_an_answer_that_is_no_reason_is_told_by_its_status(make: Callable[[], bytes]) -> None:
    assert "status 400" in str(fleet_errors._build_error(httpx.Response(400, content=make())))
