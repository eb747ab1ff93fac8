"""The front before a real flower-superlink, with TLS and SuperNode authentication on: what organizations meet, and what outsiders do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from cotune.client.site_setup import read_private_key
from cotune.errors import RunError
from cotune.flower.control_client import ControlClient, open_control
from cotune.flower.fleet_client import FleetClient, connect
from cotune.flower.fleet_errors import NodeRejected
from cotune.server.deployment.keys.certificates import create_authority
from cotune.server.deployment.members import Members, read_public_key

BINARIES = Path(sys.executable).parent
PATIENCE = 600.0  # seconds for a process to do what it should; on a shared machine a start can take long


@dataclass(frozen=True)
class Federation:
    folder: Path
    environment: dict[str, str]
    superlink_port: int
    front_port: int
    front: subprocess.Popen[bytes]

    @property
    def members(self) -> Members:
        return Members(self.folder / "members.json")

    @property
    def authority(self) -> Path:
        return self.folder / "certificates" / "ca.crt"

    def connect(self, key: Path) -> AbstractContextManager[FleetClient]:
        """As an organization's node."""
        return connect(f"127.0.0.1:{self.front_port}", self.authority.read_bytes(), read_private_key(key))

    def control(self, port: int) -> AbstractContextManager[ControlClient]:
        return open_control(f"127.0.0.1:{port}", self.authority)

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BINARIES / "flwr"), *arguments]
        return subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def key_pair(folder: Path, name: str) -> Path:
    """As `ssh-keygen -t ecdsa -b 384` writes it; the public half has the suffix .pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    (folder / name).touch(mode=0o600)
    (folder / name).write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / name


@contextmanager
def process(log: Path, environment: dict[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        running = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
    try:
        yield running
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGTERM)
        try:
            running.wait(600)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def wait_for(what: Callable[[], bool], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until, log.read_text(errors="replace")
        time.sleep(0.1)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    certificates = folder / "certificates"
    create_authority(certificates, [])
    inner = free_port()
    outer = free_port()
    home = folder / "flwr"
    home.mkdir()
    connections = [("inner", inner), ("outer", outer)]
    (home / "config.toml").write_text(
        "".join(
            f'[superlink.{name}]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{certificates / "ca.crt"}"\n'
            for name, port in connections
        )
    )
    (folder / "front.toml").write_text(
        f'certificates = "certificates"\nmembers = "members.json"\nsuperlink_port = {inner}\nhost = "127.0.0.1"\nport = {outer}\n'
    )
    environment = {
        **os.environ,
        "PATH": f"{BINARIES}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    superlink = [
        *("--host", "127.0.0.1", "--port", str(inner), "--isolation", "process", "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(certificates / "ca.crt")),
        *("--ssl-certfile", str(certificates / "server.crt"), "--ssl-keyfile", str(certificates / "server.key")),
    ]
    front = (sys.executable, "-m", "cotune.server.proxy_process", "front.toml")
    with (
        process(folder / "superlink.log", environment, str(BINARIES / "flower-superlink"), *superlink),
        process(folder / "front.log", environment, *front) as running,
    ):
        wait_for(lambda: answers(inner), folder / "superlink.log")
        wait_for(lambda: answers(outer), folder / "front.log")
        yield Federation(folder, environment, inner, outer, running)


def supernode(federation: Federation, *arguments: str) -> list[str]:
    address = f"127.0.0.1:{federation.front_port}"
    return [str(BINARIES / "flower-supernode"), "--superlink", address, "--port", str(free_port()), *arguments]


@pytest.mark.long
def test_registered_organization_joins_through_the_proxy(federation: Federation) -> None:
    """In short: test_join.py, where an organization joins by this way and trains."""
    key = key_pair(federation.folder, "hospital-a")
    federation.members.invite("hospital-a", read_public_key(key.with_suffix(".pub")))
    registered = federation.flwr("supernode", "register", f"{key}.pub", "inner", "--name", "hospital-a")
    assert registered.returncode == 0, registered.stdout + registered.stderr
    trust = ("--root-certificates", str(federation.authority))
    log = federation.folder / "supernode.log"
    command = supernode(federation, *trust, "--auth-supernode-private-key", str(key))
    with process(log, federation.environment, *command):
        wait_for(lambda: b"SuperNode ID" in log.read_bytes(), log)
        listed = json.loads(federation.flwr("supernode", "list", "inner", "--format", "json").stdout)
    assert [node["status"] for node in listed["nodes"]] == ["online"]


def test_unknown_key_is_refused(federation: Federation) -> None:
    key = key_pair(federation.folder, "stranger")
    with pytest.raises(NodeRejected), federation.connect(key):
        pass


@pytest.mark.long
def test_unknown_key_is_refused_in_the_superlinks_words(federation: Federation) -> None:
    """By Flower's own node; the code is seen without one in tests/server/proxy/test_server.py, too."""
    key = key_pair(federation.folder, "stranger")
    log = federation.folder / "stranger.log"
    trust = ("--root-certificates", str(federation.authority))
    command = supernode(federation, *trust, "--auth-supernode-private-key", str(key))
    with process(log, federation.environment, *command) as running:
        assert running.wait(PATIENCE) != 0
    assert "[code: 2004]" in log.read_text()


def test_a_revoked_key_is_turned_away_like_an_unknown_one(federation: Federation) -> None:
    key = key_pair(federation.folder, "revoked")
    federation.members.invite("revoked", read_public_key(key.with_suffix(".pub")))
    public = load_ssh_public_key(key.with_suffix(".pub").read_bytes())
    with federation.control(federation.superlink_port) as control:
        node = control.register(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "revoked")
        with federation.connect(key) as fleet:
            assert fleet.node_id == node
        federation.members.revoke("revoked")
        control.unregister(node)
    with pytest.raises(NodeRejected), federation.connect(key):
        pass


def test_the_control_api_is_not_there(federation: Federation) -> None:
    with federation.control(federation.superlink_port) as inside:
        assert inside.running() == ()
    with federation.control(federation.front_port) as outside, pytest.raises(RunError):
        outside.running()
    assert "/v1/control/list-runs" in (federation.folder / "front.log").read_text()
    assert "404" in (federation.folder / "front.log").read_text()


@pytest.mark.long
def test_plain_http_ends_a_supernode_without_retries(federation: Federation) -> None:
    """In short: tests/server/proxy/test_server.py, without a SuperNode."""
    log = federation.folder / "plain.log"  # not a pipe: it would stay open as long as any child of the SuperNode lives
    with process(log, federation.environment, *supernode(federation, "--insecure")) as running:
        assert running.wait(PATIENCE) != 0
    assert "this port speaks TLS" in " ".join(log.read_text().split())


def test_a_second_front_on_the_port_ends_with_a_sentence(federation: Federation) -> None:
    command = [sys.executable, "-m", "cotune.server.proxy_process", "front.toml"]
    second = subprocess.run(
        command, env=federation.environment, cwd=federation.folder, capture_output=True, text=True, timeout=PATIENCE
    )
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith(f"port {federation.front_port} of 127.0.0.1 is taken")
    assert "Traceback" not in second.stderr


def test_no_private_key_is_in_any_log(federation: Federation) -> None:
    """After everything above: those of the server, of its authority, and of the organizations."""
    folder = federation.folder
    keys = [*folder.glob("certificates/*.key"), *(public.with_suffix("") for public in folder.glob("*.pub"))]
    secret = [line for key in keys for line in key.read_text().splitlines() if not line.startswith("-----")]
    written = "".join(log.read_text(errors="replace") for log in folder.glob("*.log"))
    assert len(keys) >= 4
    assert "front" in written or "404" in written
    assert not [line for line in secret if line in written]


def test_the_front_ends_when_it_is_told_to(federation: Federation) -> None:
    federation.front.send_signal(signal.SIGTERM)
    assert federation.front.wait(600) == 0
