"""Small servers that are wrong in one way each."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from cotune.errors import RunError
from cotune.protocol.connectivity import check_reachable, describe_error
from cotune.server.deployment.keys.certificates import create_authority


@contextmanager
def listening(answer: Callable[[socket.socket], object], host: str = "127.0.0.1") -> Iterator[str]:
    """A server that deals with every connection so; yields its address."""
    with socket.create_server((host, 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        answer(connection)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{host}:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(600)


@contextmanager
def secure(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with listening(lambda connection: context.wrap_socket(connection, server_side=True).close(), host) as address:
        yield address


def made(folder: Path, *, days_ago: float = 0.0) -> bytes:
    """Certificates for loopback, and the authority's."""
    create_authority(folder, ["127.0.0.1"], now=datetime.now(UTC) - timedelta(days=days_ago))
    return (folder / "ca.crt").read_bytes()


def test_a_server_of_the_federation(tmp_path: Path) -> None:
    authority = made(tmp_path, days_ago=5)
    with secure(tmp_path) as address:
        left = check_reachable(address, authority) - datetime.now(UTC)
    assert timedelta(days=359) < left < timedelta(days=361)


def said(address: str, authority: bytes) -> str:
    with pytest.raises(RunError) as raised:
        check_reachable(address, authority)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_another_authority(tmp_path: Path) -> None:
    made(tmp_path / "theirs")
    with secure(tmp_path / "theirs") as address:
        assert "was not made by the federation's authority" in said(address, made(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("days_ago", "words"), [(400.0, "has expired, by this machine's clock"), (-2.0, "is not valid yet, by this")]
)
def test_a_certificate_out_of_its_time(tmp_path: Path, days_ago: float, words: str) -> None:
    authority = made(tmp_path, days_ago=days_ago)
    with secure(tmp_path) as address:
        assert words in said(address, authority)


def test_another_host(tmp_path: Path) -> None:
    authority = made(tmp_path)
    with secure(tmp_path, "127.0.0.2") as address:
        assert "is for another host" in said(address, authority)


def test_what_speaks_no_tls(tmp_path: Path) -> None:
    authority = made(tmp_path)
    with listening(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address:
        assert f"what answers at {address} does not speak TLS" in said(address, authority)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert f"nothing listens at {address}" in said(address, made(tmp_path))


def test_a_name_that_is_none(tmp_path: Path) -> None:
    assert "the name nowhere.invalid cannot be resolved" in said("nowhere.invalid:9092", made(tmp_path))


def test_nobody_answers() -> None:
    assert "does not answer" in describe_error(TimeoutError(), "10.0.0.1:9092")


def test_what_httpx_wraps_is_explained_too(tmp_path: Path) -> None:
    made(tmp_path / "theirs"), made(tmp_path / "ours")
    context = ssl.create_default_context(cafile=tmp_path / "ours" / "ca.crt")
    with secure(tmp_path / "theirs") as address, pytest.raises(httpx.ConnectError) as raised:
        httpx.get(f"https://{address}", verify=context)
    assert "was not made by the federation's authority" in describe_error(raised.value, address)
