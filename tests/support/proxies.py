"""The front between real sockets, and a small server in the SuperLink's place."""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cotune.server.deployment.keys.certificates import create_authority
from cotune.server.deployment.members import Members
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.member_quotas import Quotas
from cotune.server.proxy.server import TlsProxy
from cotune.server.proxy_process import FrontConfig, setup
from tests.support.calls import new_key, signed

CALL = "/v1/fleet/push-object"
NORTH = new_key()
SOUTH = new_key()
STRANGER = new_key()


@dataclass
class Upstream:
    """What the server in the SuperLink's place saw, and how it answers."""

    port: int
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    read: threading.Event = field(default_factory=threading.Event)  # the first four bytes of a request have come
    answer: threading.Event = field(default_factory=threading.Event)  # it may answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front") / "certificates"
    create_authority(folder, [])
    members = Members(folder.parent / "members.json")
    for name, key in (("north", NORTH), ("south", SOUTH)):
        members.invite(name, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
    return folder


@pytest.fixture
def upstream(folder: Path) -> Iterator[Upstream]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(min(4, size := int(self.headers["content-length"])))
            found.read.set()
            content += self.rfile.read(size - len(content))
            if len(content) < size:  # cut short
                self.close_connection = True
                return
            found.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, content))
            found.answer.wait(600)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("flwr-package-version", "1.41.0")
            self.send_header("Set-Cookie", "a=b")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that does not believe it is expected; only what was seen counts."""

    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        found = Upstream(server.server_address[1])
        found.answer.set()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield found
        server.shutdown()
        thread.join(600)


_NUMBERS = itertools.count(1)


@dataclass
class Running:
    port: int
    stop: Callable[[], None]
    folder: Path
    refused: Path  # where it counts whom it has refused

    def connect(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 10), server_hostname="localhost")

    def ask(self, raw: bytes) -> bytes:
        """All that comes back on a connection of its own, until the front closes it."""
        with self.connect() as connection:
            connection.sendall(raw)
            return everything(connection)


@contextmanager
def running(folder: Path, superlink_port: int, quotas: Quotas | None = None, **limits: float) -> Iterator[Running]:
    refused = folder.parent / f"refused-{next(_NUMBERS)}.json"
    config = FrontConfig(
        certificates=folder,
        members=folder.parent / "members.json",
        refusals=refused,
        superlink_port=superlink_port,
        host="127.0.0.1",
        port=0,
        limits=Limits.model_validate({"linger": 0.2, **limits}),
        quotas=quotas or Quotas(),
    )
    ready = threading.Event()
    made = []
    failed = []

    async def play() -> None:
        stopped = asyncio.Event()
        async with TlsProxy(setup(config)) as front:
            made.append((front.port, asyncio.get_running_loop(), stopped))
            ready.set()
            await stopped.wait()

    def run() -> None:
        try:
            asyncio.run(play())
        except BaseException as error:
            failed.append(error)
        ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(600)
    port, loop, stopped = made[0]

    def stop() -> None:
        if thread.is_alive():
            loop.call_soon_threadsafe(stopped.set)

    try:
        yield Running(port, stop, folder, refused)
    finally:
        stop()
        thread.join(600)
    assert not thread.is_alive()
    assert not failed


def post(
    content: bytes = b"hello",
    target: str = CALL,
    extra: str = "",
    length: int | None = None,
    key: EllipticCurvePrivateKey | None = NORTH,
) -> bytes:
    """key: whose signature it has; None: nobody's."""
    size = len(content) if length is None else length
    names = "".join(f"{name}: {value}\r\n" for name, value in (signed(key) if key else {}).items())
    return f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n{names}{extra}\r\n".encode() + content


def everything(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


def served(connection: ssl.SSLSocket, key: EllipticCurvePrivateKey = NORTH) -> ssl.SSLSocket:
    """After one request of a member on it."""
    connection.sendall(post(key=key))
    content = b""
    while not content.endswith(b"hello"):
        content += (piece := connection.recv(65536))
        assert piece, content
    return connection
