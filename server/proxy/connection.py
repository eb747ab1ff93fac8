"""One client's connection: its requests are parsed by h11 and answered by the SuperLink, one after the other.

No content is read before the signature of a member is verified. Content is streamed in both directions, one piece in memory at a
time; only announcements of replies are read as a whole, to be inspected.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from email.utils import formatdate

import h11
import httpx

from cotune.server.proxy.allowed_calls import Refusal, content_length, forwarded_headers, get_call
from cotune.server.proxy.connection_slots import Slot
from cotune.server.proxy.request_guard import RequestGuard
from cotune.server.proxy.upstream import SuperLink

CHUNK_BYTES = 64 * 1024  # bytes read at a time
_MAX_PULL_RESPONSE_BYTES = 8 * 2**20  # the part of an answer to pull-messages that is inspected: a hundred thousand objects
_NOT_TLS = Refusal(400, "this port speaks TLS, and got plain HTTP: give ca.crt of the server instead of --insecure")
_BUSY = Refusal(503, "too much is on its way to the server at the moment: try again")

log = logging.getLogger("cotune.front")


class _ClientGone(Exception):
    """The client disconnected, was too slow, or violated HTTP in the middle of a request."""


class ClientConnection:
    """A client's connection.

    Args:
        reader: Stream from the client.
        writer: Stream to the client.
        client: Its address.
        guard: Decides what passes.
        slot: Of the connection.

    Attributes:
        waiting: Whether it is idle between requests, so that closing it loses nothing.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: str, guard: RequestGuard, slot: Slot
    ) -> None:
        self.client = client
        self.limits = guard.limits
        self.waiting = True
        self._reader = reader
        self._writer = writer
        self._stopping = False
        self._guard = guard
        self._slot = slot
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=guard.limits.head)

    def stop(self) -> None:
        """End the connection after the request in progress."""
        self._stopping = True

    def cut(self) -> None:
        """End the connection at once, because its slot is needed."""
        self._writer.transport.abort()

    async def run(self, superlink: SuperLink | None) -> None:
        """Serve until the client or the proxy ends the connection.

        Args:
            superlink: None if the client does not speak TLS and only gets an error.
        """
        try:
            while await self._handle_request(superlink) and self._is_done() and not self._stopping:
                self._http.start_next_cycle()
        except (_ClientGone, OSError, ssl.SSLError, TimeoutError):
            pass  # the client disconnected; `close` cleans up
        finally:
            await self._close()

    async def _handle_request(self, superlink: SuperLink | None) -> bool:
        """Serve one request; return whether the connection may be used for another."""
        self.waiting = True
        try:
            request = await self._read_head()
        except h11.RemoteProtocolError as error:
            return await self._refuse(None, Refusal(error.error_status_hint, "this is not HTTP as Flower speaks it"))
        if request is None:
            return False
        self.waiting = False
        if superlink is None:
            return await self._refuse(request, _NOT_TLS)
        member = self._guard.admit(request, self._slot, self._get_client_address(request))
        if isinstance(member, Refusal):
            return await self._refuse(request, member)
        return await self._serve_member(request, superlink, member)

    async def _read_head(self) -> h11.Request | None:
        async with asyncio.timeout(self.limits.timeout):
            event = await self._read_event()
        return event if isinstance(event, h11.Request) else None

    async def _serve_member(self, request: h11.Request, superlink: SuperLink, member: str) -> bool:
        """Serve a member's request; its content is read once the limits on content in transfer permit it."""
        traffic = self._guard.traffic
        size = content_length(request)
        announces = get_call(request) == "push-messages"
        async with AsyncExitStack() as held:
            try:
                if announces:
                    await held.enter_async_context(traffic.announcement_turn(member))
                await held.enter_async_context(traffic.reserve(member, size))
            except TimeoutError:
                return await self._refuse(request, _BUSY)
            content = self._read_content(size)
            if not announces:
                return await self._forward(request, superlink, content, member)
            whole = b"".join([piece async for piece in content])
            if refusal := self._guard.inspect_push(whole, member):
                return await self._refuse(request, refusal)
            return await self._forward(request, superlink, whole, member)

    async def _forward(
        self, request: h11.Request, superlink: SuperLink, content: AsyncIterator[bytes] | bytes, member: str
    ) -> bool:
        try:
            answer = await superlink.ask(request, content, self._get_client_address(request))
        except httpx.TransportError as error:
            late = isinstance(error, httpx.TimeoutException)
            line = f"the SuperLink at {superlink.url} did not answer ({error or type(error).__name__})"
            self._guard.log.write("superlink", line)
            return await self._refuse(request, Refusal(504 if late else 502, "the SuperLink does not answer: it may be starting"))
        try:
            await self._send_response(answer, get_call(request), member)
        except httpx.TransportError as error:
            raise _ClientGone from error  # part of the answer is sent; only closing the connection can signal the failure
        finally:
            await answer.aclose()
        return True

    async def _send_response(self, answer: httpx.Response, call: str, member: str) -> None:
        """Send the SuperLink's answer; objects announced by pull-messages are recorded before the client sees them."""
        pieces = answer.aiter_raw(CHUNK_BYTES)
        announces = call == "pull-messages"
        first = await _read_up_to(pieces, _MAX_PULL_RESPONSE_BYTES) if announces else []
        if announces and answer.status_code == httpx.codes.OK:
            self._guard.record_requests(member, b"".join(first))
        await self._send(h11.Response(status_code=answer.status_code, headers=forwarded_headers(answer.headers.raw)))
        for piece in first:
            await self._send(h11.Data(data=piece))
        async for piece in pieces:
            self._guard.usage.record_response(member, call, len(piece))
            await self._send(h11.Data(data=piece))
        await self._send(h11.EndOfMessage())

    def _get_client_address(self, request: h11.Request) -> str:
        """Return the client's address; behind the coordinator's own proxy, the address which that proxy states."""
        if self._slot.address is not None:
            return self.client
        given = [value for name, value in request.headers if name == b"x-forwarded-for"]
        return given[-1].decode("latin-1").rpartition(",")[2].strip()[:60] if given else self.client

    async def _read_content(self, size: int) -> AsyncIterator[bytes]:
        deadline = asyncio.get_running_loop().time() + self.limits.get_transfer_seconds(size)
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await self._read_event()
            except h11.RemoteProtocolError as error:
                raise _ClientGone from error
            if not isinstance(event, h11.Data):
                return
            yield bytes(event.data)

    async def _read_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(CHUNK_BYTES))
        return event

    async def _send(self, event: h11.Event) -> None:
        if data := self._http.send(event):
            self._writer.write(data)
            async with asyncio.timeout(self.limits.get_transfer_seconds(len(data))):
                await self._writer.drain()

    async def _refuse(self, request: h11.Request | None, refusal: Refusal) -> bool:
        """Answer in the format of Flower's own errors, whose sentence its client shows.

        Returns:
            False: the connection must not be used for another request.
        """
        self.waiting = False
        what = f"{request.method.decode()} {request.target.decode()[:200]}" if request else "what is no request"
        line = f"refused {what} of {self._slot.member or self.client}: {refusal.status}, {refusal.reason}"
        self._guard.log.write(f"{refusal.status} {self._slot.member or self._slot.address}", line)
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        content = json.dumps({"code": refusal.code or refusal.status, "detail": refusal.reason}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        headers.append(("date", formatdate(usegmt=True)))
        await self._send(h11.Response(status_code=refusal.status, headers=headers))
        if request is None or request.method != b"HEAD":
            await self._send(h11.Data(data=content))
        await self._send(h11.EndOfMessage())
        async with asyncio.timeout(self.limits.linger):
            while await self._reader.read(CHUNK_BYTES):
                pass  # discarded without parsing
        return False

    def _is_done(self) -> bool:
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _close(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(self.limits.linger):
                await self._writer.wait_closed()
        except (OSError, ssl.SSLError, TimeoutError):
            self._writer.transport.abort()


async def _read_up_to(pieces: AsyncIterator[bytes], most: int) -> list[bytes]:
    """Read chunks until they have at least `most` bytes together, or none are left."""
    found = list[bytes]()
    size = 0
    async for piece in pieces:
        found.append(piece)
        size += len(piece)
        if size >= most:
            break
    return found
