"""The front: the one public port of a coordinator. It ends TLS, knows the members, and passes their Fleet calls to a SuperLink.

It is told everything that it needs, so that it stays small, and apart from the rest: `ProxySetup`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from cotune.errors import RunError
from cotune.server.proxy.authentication import FindMember
from cotune.server.proxy.connection import PIECE, ClientConnection
from cotune.server.proxy.fleet_format import FleetFormat
from cotune.server.proxy.guard import RequestGuard, ignore_refusal
from cotune.server.proxy.quotas import Quotas
from cotune.server.proxy.rules import Limits
from cotune.server.proxy.slots import Slot, get_address_group
from cotune.server.proxy.upstream import SuperLink

TLS_HANDSHAKE = b"\x16"  # the first byte of every TLS connection (RFC 8446, 5.1)

log = logging.getLogger("cotune.front")


@dataclass(frozen=True)
class ProxySetup:
    """What the proxy is made of.

    Attributes:
        host: The address to listen at.
        port: The port to listen at; 0: any that is free.
        context: Holds the certificate that the proxy shows.
        superlink_port: Of the SuperLink on 127.0.0.1.
        trusted: Verifies the SuperLink's certificate.
        known: Returns the member that a public key belongs to.
        fleet: Names, numbers and parsers of the API that is passed on.
        refused: Called with the member whose announcement was refused, or whose quota is used up, and the reason.
        limits: What one client may take.
        quotas: What one member may take.
        proxied: Whether all connections come from a proxy of the server's own, which counts them.
        turned_away: Called with the address of a stranger that sends too much at once, and the reason.
    """

    host: str
    port: int
    context: ssl.SSLContext
    superlink_port: int
    trusted: ssl.SSLContext
    known: FindMember
    fleet: FleetFormat
    refused: Callable[[str, str], None] = lambda member, reason: None
    limits: Limits = field(default_factory=Limits)
    quotas: Quotas = field(default_factory=Quotas)
    proxied: bool = False
    turned_away: Callable[[str, str], None] = ignore_refusal


def serve(setup: ProxySetup) -> None:
    """Until SIGTERM or SIGINT. Raises RunError as `TlsProxy` does."""
    asyncio.run(_until_signaled(setup))


async def _until_signaled(setup: ProxySetup) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with TlsProxy(setup) as front:
        log.info("listening at %s, port %d, for the SuperLink at %s", setup.host, front.port, front.superlink.url)
        await stopped.wait()


class TlsProxy:
    """Listens as long as it is entered; leaving it lets the requests under way finish, for `limits.grace` seconds.

    Raises RunError on entry when the port cannot be had.
    """

    superlink: SuperLink

    def __init__(self, setup: ProxySetup) -> None:
        self.setup = setup
        self.limits = setup.limits
        self.guard = RequestGuard.of(setup.limits, setup.quotas, setup.known, setup.fleet, setup.refused, setup.turned_away)
        self._exchanges: dict[asyncio.Task[None], ClientConnection | None] = {}  # None: the handshake is not over

    async def __aenter__(self) -> Self:
        self._listener = listen(self.setup.host, self.setup.port)
        self.port: int = self._listener.getsockname()[1]
        self.superlink = SuperLink(self.setup.superlink_port, self.setup.trusted, self.limits)
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
        for grace in (self.limits.grace, self.limits.linger):
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
                self.guard.log.tell("accept", f"a connection could not be accepted ({error})")
                await asyncio.sleep(0.1)
                continue
            self._begin(connection, address[0])

    def _begin(self, connection: socket.socket, client: str) -> None:
        tasks = list[asyncio.Task[None]]()
        address = None if self.setup.proxied else get_address_group(client)
        slot = self.guard.slots.enter(address, lambda: self._evict(tasks[0], client))
        if slot is None:
            line = f"{client} holds {self.limits.connections_per_address} connections of members: one more is refused"
            self.guard.log.tell(f"full {address}", line)
            connection.close()  # Flower's clients try again
            return
        tasks.append(task := asyncio.create_task(self._converse(connection, client, slot)))
        self._exchanges[task] = None
        task.add_done_callback(lambda task: self._end(task, connection, client, slot))

    def _evict(self, task: asyncio.Task[None], client: str) -> None:
        line = f"{self.limits.strangers} connections of strangers, or too many of one address: the oldest of {client} makes room"
        self.guard.log.tell("evicted", line)
        if exchange := self._exchanges[task]:
            exchange.cut()
        task.cancel()

    def _end(self, task: asyncio.Task[None], connection: socket.socket, client: str, slot: Slot) -> None:
        if self._exchanges.pop(task) is None:
            connection.close()  # perhaps it was evicted before the task had begun
        self.guard.slots.leave(slot)
        if not task.cancelled() and (error := task.exception()):
            self.guard.log.tell("failed", f"a connection of {client} failed ({type(error).__name__}: {error})")

    async def _converse(self, connection: socket.socket, client: str, slot: Slot) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(self.limits.first_byte):
                encrypted = await _first_byte(connection) == TLS_HANDSHAKE
            async with asyncio.timeout(self.limits.patience):
                reader, writer = await _streams(connection, self.setup.context if encrypted else None)
        except (OSError, ssl.SSLError, TimeoutError):
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        exchange = self._exchanges[task] = ClientConnection(reader, writer, client, self.guard, slot)
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


async def _first_byte(connection: socket.socket) -> bytes:
    """Looked at, and left there for the handshake."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
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
