"""The front between real sockets: clients as raw TLS connections, and a small server in the SuperLink's place."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cotune.models.errors import RunError
from cotune.server.certificates import new_authority
from cotune.server.proxy.server import Front, FrontConfig, read_config
from cotune.server.proxy.rules import Limits

CALL = "/v1/fleet/push-object"


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
    new_authority(folder, [])
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
            found.answer.wait(10)
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
        thread.join(10)


@dataclass
class Running:
    port: int
    stop: Callable[[], None]
    folder: Path

    def connect(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 10), server_hostname="localhost")

    def ask(self, raw: bytes) -> bytes:
        """All that comes back on a connection of its own, until the front closes it."""
        with self.connect() as connection:
            connection.sendall(raw)
            return everything(connection)


@contextmanager
def running(folder: Path, superlink_port: int, **limits: float) -> Iterator[Running]:
    config = FrontConfig(
        certificates=folder,
        superlink_port=superlink_port,
        host="127.0.0.1",
        port=0,
        limits=Limits.model_validate({"linger": 0.2, **limits}),
    )
    ready, made, failed = threading.Event(), [], []

    async def play() -> None:
        stopped = asyncio.Event()
        async with Front(config) as front:
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
    ready.wait(60)
    port, loop, stopped = made[0]

    def stop() -> None:
        if thread.is_alive():
            loop.call_soon_threadsafe(stopped.set)

    try:
        yield Running(port, stop, folder)
    finally:
        stop()
        thread.join(20)
    assert not thread.is_alive()
    assert not failed


@pytest.fixture
def front(folder: Path, upstream: Upstream) -> Iterator[Running]:
    with running(folder, upstream.port, patience=5, body=1024 * 1024) as front:
        yield front


def post(content: bytes = b"hello", target: str = CALL, extra: str = "", length: int | None = None) -> bytes:
    size = len(content) if length is None else length
    return f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n{extra}\r\n".encode() + content


def everything(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def detail(answer: bytes) -> str:
    content = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert content["code"] == status(answer)
    return str(content["detail"])


def test_a_call_of_the_fleet_passes_with_what_flower_needs_and_no_more(front: Running, upstream: Upstream) -> None:
    extra = "Content-Type: application/protobuf\r\nflwr-signature: abc\r\nX-Forwarded-For: 9.9.9.9\r\nConnection: close\r\nCookie: c\r\n"
    head, _, content = front.ask(post(extra=extra)).partition(b"\r\n\r\n")
    assert (status(head), content) == (200, b"hello")
    assert b"flwr-package-version: 1.41.0" in head.lower()
    assert b"cookie" not in head.lower()
    path, headers, received = upstream.seen[0]
    assert (path, received) == (CALL, b"hello")
    assert headers["host"] == f"127.0.0.1:{upstream.port}"
    del headers["host"]
    assert headers == {
        "content-length": "5",
        "content-type": "application/protobuf",
        "flwr-signature": "abc",
        "x-forwarded-for": "127.0.0.1",
    }


@pytest.mark.parametrize(
    "target",
    ["/", "/v1/control/list-runs", "/v1/runtime/get-nodes", "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs",
     "/v1/fleet%2fget-run", "/v1/fleet//get-run", "/v1/fleet/get-run?x", "/V1/FLEET/get-run", "https://x/v1/fleet/get-run", "*"],
)  # fmt: skip
def test_everything_else_is_not_found(front: Running, upstream: Upstream, target: str) -> None:
    answer = front.ask(post(target=target))
    assert status(answer) == 404
    assert "Fleet API" in detail(answer)
    assert upstream.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "CONNECT"])
def test_other_methods_are_not_found(front: Running, upstream: Upstream, method: str) -> None:
    assert status(front.ask(f"{method} {CALL} HTTP/1.1\r\nHost: x\r\n\r\n".encode())) == 404
    assert upstream.seen == []


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (post(extra="Transfer-Encoding: chunked\r\n"), 400),
        (post(extra="Transfer-Encoding: gzip, chunked\r\n"), 501),
        (post(extra="Transfer-Encoding : chunked\r\n"), 400),
        (post(extra="Content-Length: 6\r\n"), 400),
        (post(extra="Content-Length: +5\r\n"), 400),
        (post(extra="Upgrade: websocket\r\nConnection: Upgrade\r\n"), 400),
        (post(extra="Expect: 100-continue\r\n"), 400),
        (post(extra="Host: y\r\n"), 400),
        (f"POST {CALL} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 411),
        (f"POST {CALL} HTTP/2.0\r\nHost: x\r\n\r\n".encode(), 505),
        (post(length=1024 * 1024 + 1), 413),
        (post(extra=f"flwr-long: {'x' * 20_000}\r\n"), 431),
        (b"\x00\x01\x02\r\n\r\n", 400),
    ],
    ids=[
        "chunked",
        "gzip",
        "space",
        "lengths",
        "sign",
        "upgrade",
        "expect",
        "hosts",
        "no-length",
        "http2",
        "large",
        "head",
        "noise",
    ],
)
def test_what_is_ambiguous_or_too_large_ends_the_connection(
    front: Running, upstream: Upstream, raw: bytes, expected: int
) -> None:
    answer = front.ask(raw + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status(answer) == expected
    assert answer.count(b"HTTP/1.1 ") == 1
    assert upstream.seen == []


def test_requests_follow_each_other_and_each_is_looked_at(front: Running, upstream: Upstream) -> None:
    answer = front.ask(post(b"one") + post(b"two") + post(target="/v1/control/list-runs") + post(b"three"))
    assert [int(part.split(b" ", 1)[0]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, 404]
    assert [content for _, _, content in upstream.seen] == [b"one", b"two"]


def test_content_streams_through_before_it_is_complete(front: Running, upstream: Upstream) -> None:
    with front.connect() as connection:
        connection.sendall(post(b"0123", length=8, extra="Connection: close\r\n"))
        assert upstream.read.wait(5)
        connection.sendall(b"4567")
        assert everything(connection).endswith(b"01234567")


def test_a_megabyte_comes_back_whole(front: Running) -> None:
    content = bytes(range(256)) * 4096
    assert front.ask(post(content, extra="Connection: close\r\n")).partition(b"\r\n\r\n")[2] == content


def test_a_client_that_vanishes_in_the_middle_is_no_request(front: Running, upstream: Upstream) -> None:
    with front.connect() as connection:
        connection.sendall(post(b"0123", length=8))
        assert upstream.read.wait(5)
    assert status(front.ask(post(extra="Connection: close\r\n"))) == 200
    assert [content for _, _, content in upstream.seen] == [b"hello"]


@pytest.mark.parametrize("sent", [b"", b"POST /v1/fl", post(b"0123", length=8)], ids=["nothing", "head", "content"])
def test_slow_clients_are_cut(folder: Path, upstream: Upstream, sent: bytes) -> None:
    with running(folder, upstream.port, patience=1, bytes_per_second=1000) as front:
        assert front.ask(sent) == b""
    assert upstream.seen == []


def test_a_handshake_that_never_comes_is_cut(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, patience=1) as front:
        for sent in (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"):
            with socket.create_connection(("127.0.0.1", front.port), 10) as connection:
                connection.sendall(sent)
                assert everything(connection) == b""


def test_plain_http_is_told_that_this_is_tls(front: Running, upstream: Upstream) -> None:
    with socket.create_connection(("127.0.0.1", front.port), 10) as connection:
        connection.sendall(post())
        connection.shutdown(socket.SHUT_WR)
        answer = everything(connection)
    assert status(answer) == 400
    assert "speaks TLS" in detail(answer)
    assert upstream.seen == []


def test_connections_of_one_address_are_limited_and_freed(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, connections_per_address=2) as front:
        first, second = front.connect(), front.connect()
        with pytest.raises(OSError, match=r"."):
            front.connect()
        first.close()
        assert status(eventually(lambda: front.ask(post(extra="Connection: close\r\n")))) == 200
        second.close()


def eventually(act: Callable[[], bytes]) -> bytes:
    """As the front learns of a closed connection a moment later."""
    until = time.monotonic() + 10
    while True:
        try:
            return act()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def test_a_superlink_that_is_away_or_slow_is_one_to_try_again(folder: Path, upstream: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    with running(folder, nobody) as front:
        assert status(front.ask(post())) == 502
    upstream.answer.clear()
    with running(folder, upstream.port, answer=0.2) as front:
        assert status(front.ask(post())) == 504
    upstream.answer.set()


def test_a_superlink_of_another_authority_is_not_believed(folder: Path, upstream: Upstream, tmp_path: Path) -> None:
    new_authority(tmp_path / "other", [])
    with running(tmp_path / "other", upstream.port) as front:
        assert status(front.ask(post())) == 502
    assert upstream.seen == []


def test_stopping_lets_a_request_finish_and_cuts_who_only_waits(folder: Path, upstream: Upstream) -> None:
    upstream.answer.clear()
    with running(folder, upstream.port) as front, front.connect() as idle, front.connect() as busy:
        busy.sendall(post())
        assert upstream.read.wait(5)
        front.stop()
        assert everything(idle) == b""
        with pytest.raises(OSError, match=r"."):
            front.connect()
        upstream.answer.set()
        assert everything(busy).endswith(b"hello")


def test_stopping_does_not_wait_for_ever(folder: Path, upstream: Upstream) -> None:
    upstream.answer.clear()
    with running(folder, upstream.port, grace=0.1) as front, front.connect() as busy:
        busy.sendall(post())
        assert upstream.read.wait(5)
        front.stop()
        assert everything(busy) == b""
        upstream.answer.set()


def enter(config: FrontConfig) -> None:
    async def play() -> None:
        async with Front(config):
            pass

    asyncio.run(play())


def test_a_port_that_is_taken_is_one_sentence(folder: Path, front: Running) -> None:
    config = FrontConfig(certificates=folder, superlink_port=1, host="127.0.0.1", port=front.port)
    with pytest.raises(RunError, match=f"port {front.port} of 127.0.0.1 is taken: .* choose another port"):
        enter(config)


def test_an_address_of_another_machine_is_one_sentence(folder: Path) -> None:
    with pytest.raises(RunError, match="cannot be listened at .*expected an address of this machine"):
        enter(FrontConfig(certificates=folder, superlink_port=1, host="192.0.2.1", port=0))


def test_it_does_not_start_with_an_expired_certificate(tmp_path: Path) -> None:
    new_authority(tmp_path, [], now=datetime.now(UTC) - timedelta(days=400))
    with pytest.raises(RunError, match="expired"):
        enter(FrontConfig(certificates=tmp_path, superlink_port=1, port=0))


def test_its_file_is_read_relative_to_itself(tmp_path: Path) -> None:
    file = tmp_path / "front.toml"
    file.write_text('certificates = "certificates"\nsuperlink_port = 8000\n[limits]\nbody = 2048\n')
    config = read_config(file)
    assert (config.certificates, config.port, config.limits.body) == (tmp_path / "certificates", 9092, 2048)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("superlink_port = 1", 'lacks "certificates"'),
        ('certificates = "c"\nsuperlink_port = 1\nhots = "x"', "did you mean 'host'"),
        ('certificates = "c"\nsuperlink_port = 70000', "superlink_port = 70000"),
        ("= 1", "front.toml: "),
    ],
)
def test_what_is_wrong_in_its_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "front.toml"
    file.write_text(text)
    with pytest.raises(RunError, match=sentence):
        read_config(file)
    with pytest.raises(RunError, match="cannot be read"):
        read_config(tmp_path / "nowhere.toml")
