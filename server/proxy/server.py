"""The front, the coordinator's only public port: it terminates TLS, authenticates members and forwards calls to the SuperLink.

Everything it needs is passed in as `ProxySetup`, so that it stays small and depends on no other part of cotune.
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
from cotune.server.proxy.connection import CHUNK_BYTES, ClientConnection
from cotune.server.proxy.connection_slots import Slot, get_address_group
from cotune.server.proxy.fleet_types import FleetFormat
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.member_quotas import Quotas
from cotune.server.proxy.request_guard import RequestGuard, ignore_refusal
from cotune.server.proxy.upstream import SuperLink

TLS_HANDSHAKE = b"\x16"  # the first byte of every TLS connection (RFC 8446, 5.1)

log = logging.getLogger("cotune.front")


@dataclass(frozen=True)
class ProxySetup:
    """Everything the proxy depends on.

    Attributes:
        host: Address to listen at.
        port: Port to listen at; 0: any free one.
        context: TLS context with the proxy's certificate.
        superlink_port: Of the SuperLink on 127.0.0.1.
        trusted: TLS context that verifies the SuperLink's certificate.
        known: Returns the member that a public key belongs to.
        fleet: Names, numbers and parsers of the Fleet API.
        refused: Called with the member whose announcement was refused, or whose quota is used up, and the reason.
        limits: What one client may use.
        quotas: What one member may use.
        proxied: Whether all connections come from the coordinator's own proxy, which limits them by address.
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
    """Serve until SIGTERM or SIGINT.

    Raises:
        RunError: If the port cannot be opened.
    """
    asyncio.run(_serve_until_signaled(setup))


async def _serve_until_signaled(setup: ProxySetup) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with TlsProxy(setup) as front:
        log.info("listening at %s, port %d, for the SuperLink at %s", setup.host, front.port, front.superlink.url)
        await stopped.wait()


class TlsProxy:
    """The proxy, an async context manager that listens inside its block.

    On exit, requests in progress have `limits.grace` seconds to finish.

    Raises:
        RunError: On entry, if the port cannot be opened.
    """

    superlink: SuperLink

    def __init__(self, setup: ProxySetup) -> None:
        self.setup = setup
        self.limits = setup.limits
        self.guard = RequestGuard.of(setup.limits, setup.quotas, setup.known, setup.fleet, setup.refused, setup.turned_away)
        self._connections: dict[asyncio.Task[None], ClientConnection | None] = {}  # None: the handshake is not over

    async def __aenter__(self) -> Self:
        self._listener = open_listener(self.setup.host, self.setup.port)
        self.port: int = self._listener.getsockname()[1]
        self.superlink = SuperLink(self.setup.superlink_port, self.setup.trusted, self.limits)
        self._accept_task = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._accept_task.cancel()
        await asyncio.wait([self._accept_task])
        self._listener.close()
        for task, connection_handler in self._connections.items():
            if connection_handler is None or connection_handler.waiting:
                task.cancel()
            else:
                connection_handler.stop()
        for grace in (self.limits.grace, self.limits.linger):
            if self._connections:
                await asyncio.wait(self._connections, timeout=grace)
            for task in self._connections:
                task.cancel()
        await self.superlink.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:  # the client has disconnected already, or no file descriptor is left
                self.guard.log.write("accept", f"a connection could not be accepted ({error})")
                await asyncio.sleep(0.1)
                continue
            self._start_connection(connection, address[0])

    def _start_connection(self, connection: socket.socket, client: str) -> None:
        tasks = list[asyncio.Task[None]]()
        address = None if self.setup.proxied else get_address_group(client)
        slot = self.guard.slots.enter(address, lambda: self._evict(tasks[0], client))
        if slot is None:
            line = f"{client} holds {self.limits.connections_per_address} connections of members: one more is refused"
            self.guard.log.write(f"full {address}", line)
            connection.close()  # Flower's clients try again
            return
        tasks.append(task := asyncio.create_task(self._handle_connection(connection, client, slot)))
        self._connections[task] = None
        task.add_done_callback(lambda task: self._end_connection(task, connection, client, slot))

    def _evict(self, task: asyncio.Task[None], client: str) -> None:
        line = f"{self.limits.strangers} connections of strangers, or too many of one address: the oldest of {client} makes room"
        self.guard.log.write("evicted", line)
        if connection_handler := self._connections[task]:
            connection_handler.cut()
        task.cancel()

    def _end_connection(self, task: asyncio.Task[None], connection: socket.socket, client: str, slot: Slot) -> None:
        if self._connections.pop(task) is None:
            connection.close()  # it may have been evicted before the task started
        self.guard.slots.leave(slot)
        if not task.cancelled() and (error := task.exception()):
            self.guard.log.write("failed", f"a connection of {client} failed ({type(error).__name__}: {error})")

    async def _handle_connection(self, connection: socket.socket, client: str, slot: Slot) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(self.limits.first_byte):
                encrypted = await _peek_first_byte(connection) == TLS_HANDSHAKE
            async with asyncio.timeout(self.limits.timeout):
                reader, writer = await _open_streams(connection, self.setup.context if encrypted else None)
        except (OSError, ssl.SSLError, TimeoutError):
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        connection_handler = self._connections[task] = ClientConnection(reader, writer, client, self.guard, slot)
        await connection_handler.run(self.superlink if encrypted else None)


def open_listener(host: str, port: int) -> socket.socket:
    """Open a port to listen at.

    Raises:
        RunError: If the port is in use or not permitted, or the address does not belong to this machine.
    """
    try:
        dual = host == "::" and socket.has_dualstack_ipv6()
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RunError(
                f"port {port} of {host} is taken: end the program that listens there, or choose another port",
                code="run.port_in_use",
            ) from None
        if error.errno == errno.EACCES:
            raise RunError(
                f"port {port} needs the administrator's rights: choose one from 1024 on", code="run.port_not_permitted"
            ) from None
        raise RunError(
            f"{host}, port {port}, cannot be listened at ({error.strerror}): expected an address of this machine",
            code="run.invalid_listen_address",
        ) from None
    listener.setblocking(False)
    return listener


async def _peek_first_byte(connection: socket.socket) -> bytes:
    """Return the first byte without consuming it, so that the TLS handshake still reads it."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    connection.setblocking(False)
    loop.add_reader(connection, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)


async def _open_streams(
    connection: socket.socket, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=CHUNK_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
