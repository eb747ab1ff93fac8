"""The front: the one public port of a coordinator. It ends TLS, and passes Fleet calls on to a SuperLink on loopback.

`python -m cotune.server.proxy.server front.toml` is the process that a supervisor runs; it ends on SIGTERM or SIGINT.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import ssl
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import Field, ValidationError

from cotune.models.errors import CotuneError, RunError
from cotune.models.table import Table, first_mistake
from cotune.server import certificates
from cotune.server.proxy.connection import PIECE, Exchange, SuperLink
from cotune.server.proxy.rules import Limits

__all__ = ["Front", "FrontConfig", "listen", "read_config", "serve"]

TLS_HANDSHAKE = b"\x16"  # the first byte of every TLS connection (RFC 8446, 5.1)

log = logging.getLogger("cotune.front")


class FrontConfig(Table):
    """front.toml. The SuperLink shows the certificate of the same folder, which is for loopback too."""

    certificates: Path  # a folder as `new_authority` writes it, relative to front.toml
    superlink_port: int = Field(ge=1, le=65535)  # on 127.0.0.1
    host: str = "0.0.0.0"  # the address to listen at; "::" for IPv6 and IPv4
    port: int = Field(9092, ge=0, le=65535)  # 0: any that is free
    limits: Limits = Limits()


def read_config(path: Path) -> FrontConfig:
    """Raises RunError for a file that cannot be read, is not TOML, or has a key that is unknown or wrong."""
    try:
        config = FrontConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): expected the front's configuration") from None
    except ValueError as error:
        mistake = first_mistake(error, FrontConfig, "front's configuration") if isinstance(error, ValidationError) else f"{error}"
        raise RunError(f"{path}: {mistake}") from None
    return config.model_copy(update={"certificates": path.parent / config.certificates})


def serve(config: FrontConfig) -> None:
    """Until SIGTERM or SIGINT. Raises RunError as `Front` does."""
    asyncio.run(_until_signalled(config))


async def _until_signalled(config: FrontConfig) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with Front(config) as front:
        log.info("listening at %s, port %d, for the SuperLink at %s", config.host, front.port, front.superlink.url)
        await stopped.wait()


class Front:
    """Listens as long as it is entered; leaving it lets the requests under way finish, for `limits.grace` seconds.

    Raises RunError on entry when the certificates would not be accepted or the port cannot be had.
    """

    superlink: SuperLink

    def __init__(self, config: FrontConfig) -> None:
        self.config = config
        self._exchanges: dict[asyncio.Task[None], Exchange | None] = {}  # None: the handshake is not over
        self._addresses: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        expiry = certificates.check(self.config.certificates)
        log.info("the certificate expires on %s", f"{expiry:%Y-%m-%d}")
        self._context = _server_context(self.config.certificates)
        trusted = ssl.create_default_context(cafile=str(self.config.certificates / "ca.crt"))
        self._listener = listen(self.config.host, self.config.port)
        self.port: int = self._listener.getsockname()[1]
        self.superlink = SuperLink(self.config.superlink_port, trusted, self.config.limits)
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listener.close()
        for task, exchange in self._exchanges.items():
            if exchange is None or exchange.waiting:
                task.cancel()
            else:
                exchange.stop()
        for grace in (self.config.limits.grace, self.config.limits.linger):
            if self._exchanges:
                await asyncio.wait(self._exchanges, timeout=grace)
            for task in self._exchanges:
                task.cancel()
        await self.superlink.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:  # the client is gone already, or there is no file descriptor left
                log.warning("a connection could not be accepted (%s)", error)
                await asyncio.sleep(0.1)
                continue
            self._begin(connection, address[0])

    def _begin(self, connection: socket.socket, client: str) -> None:
        limits = self.config.limits
        if len(self._exchanges) >= limits.connections or self._addresses[client] >= limits.connections_per_address:
            log.warning("too many connections: %d, of which %d from %s", len(self._exchanges), self._addresses[client], client)
            connection.close()  # Flower's clients try again
            return
        task = asyncio.create_task(self._converse(connection, client))
        self._exchanges[task] = None
        self._addresses[client] += 1
        task.add_done_callback(lambda task: self._end(task, client))

    def _end(self, task: asyncio.Task[None], client: str) -> None:
        del self._exchanges[task]
        self._addresses -= Counter([client])  # drops an address at zero
        if not task.cancelled() and (error := task.exception()):
            log.error("a connection of %s failed", client, exc_info=error)

    async def _converse(self, connection: socket.socket, client: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(self.config.limits.patience):
                encrypted = await _first_byte(connection) == TLS_HANDSHAKE
                reader, writer = await _streams(connection, self._context if encrypted else None)
        except (OSError, ssl.SSLError, TimeoutError):
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        exchange = self._exchanges[task] = Exchange(reader, writer, client, self.config.limits)
        await exchange.run(self.superlink if encrypted else None)


def listen(host: str, port: int) -> socket.socket:
    """Raises RunError, in one sentence, where the port cannot be had."""
    try:
        dual = host == "::" and socket.has_dualstack_ipv6()
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RunError(
                f"port {port} of {host} is taken: end the program that listens there, or choose another port"
            ) from None
        if error.errno == errno.EACCES:
            raise RunError(f"port {port} needs the administrator's rights: choose one from 1024 on") from None
        raise RunError(
            f"{host}, port {port}, cannot be listened at ({error.strerror}): expected an address of this machine"
        ) from None
    listener.setblocking(False)
    return listener


def _server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 or later
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


async def _first_byte(connection: socket.socket) -> bytes:
    """Looked at, and left there for the handshake."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    connection.setblocking(False)
    loop.add_reader(connection, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)


async def _streams(
    connection: socket.socket, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=PIECE)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def main(arguments: Sequence[str]) -> int:
    """The process of a supervisor: exit code 0 after a signal, otherwise 1 or 2 and one sentence."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if len(arguments) != 1:
        print("usage: python -m cotune.server.proxy.server front.toml", file=sys.stderr)
        return 2
    try:
        serve(read_config(Path(arguments[0])))
    except CotuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
