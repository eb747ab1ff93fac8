"""What a member can ask the SuperLink for about a run: nothing of it says where, on which machine or as whom the server runs."""

from __future__ import annotations

import getpass
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.run_pb2 import GetRunRequest

from cotune.flower.control_client import open_control
from cotune.flower.fleet_client import AnnouncedRequest, FleetClient, connect
from cotune.plan.load import parse_plan
from cotune.protocol.messages import decode_header
from cotune.protocol.signatures import SIGNED, detach
from cotune.server.deployment.creation import create_federation
from cotune.server.deployment.federation import FederationFolder, ServerConfig
from cotune.server.deployment.new_run import create_run
from tests.support.served import free_port, serving, until

pytestmark = pytest.mark.long

A_PATH = re.compile(r"(?<![\w.~-])(?:/[\w.-]+){2,}")


@pytest.fixture
def folder(tmp_path: Path, base_model: Callable[[str], Path]) -> FederationFolder:
    plan = parse_plan(
        {"model": {"base": str(base_model("bert"))}, "data": {"source": "x.csv"}, "labels": ["a", "b"], "privacy": "none"}
    )
    config = ServerConfig(
        name="toy", hosts=("127.0.0.1",), listen="127.0.0.1", port=free_port(), superlink_port=free_port(), device="cpu"
    )
    return create_federation(tmp_path / "fed", plan, config)


def asked(node: FleetClient) -> AnnouncedRequest:
    for _ in range(600):
        if request := node.receive():
            return request
        time.sleep(0.1)
    raise AssertionError("no request came")


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def test_a_member_learns_no_place_no_host_and_no_user(folder: FederationFolder) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    folder.members.invite("hospital-a", key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
    run = create_run(folder, name="one")
    with serving(folder) as served:
        until(lambda: served.keys() == served.members() and listens(folder.config.port), served.log)
        authority = (folder.certificates / "ca.crt").read_bytes()
        with open_control(folder.superlink_address, folder.certificates) as calls:
            calls.start(run.path)
        with connect(f"127.0.0.1:{folder.config.port}", authority, key) as node:
            request = asked(node)
            about = node._client.GetRun(GetRunRequest(node=node._node, run_id=request.run)).run
            plan = decode_header(detach(node.open(request).header("request", SIGNED).content)[0]).plan
            bundle = node._client.GetFab(GetFabRequest(node=node._node, hash_str=about.fab_hash, run_id=request.run))
        read = [str(about), str(request.header), *(str(part) for part in (request.tree, bundle.fab.verifications))]
        read += [bundle.fab.content.decode("latin-1"), plan]
    for text in read:
        assert not A_PATH.search(text), text
        for secret in (str(folder.path), folder.path.name + "/", socket.gethostname(), f"/{getpass.getuser()}"):
            assert secret not in text
    assert dict(about.override_config)["run"].string == "one"
