"""One client's connection at the front: its requests one after the other, read by h11, answered by the SuperLink.

Content streams through in pieces in both directions; nothing is held but one piece.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator

import h11
import httpx

from cotune.server.proxy.rules import Limits, Refusal, content_length, passed_on, reason_to_refuse

__all__ = ["Exchange", "SuperLink"]

PIECE = 64 * 1024  # bytes read at a time
PLAIN = Refusal(400, "this port speaks TLS, and got plain HTTP: give ca.crt of the server instead of --insecure")

log = logging.getLogger("cotune.front")


class SuperLink:
    """The SuperLink on this machine's loopback, over TLS: with SuperNode authentication it speaks nothing else."""

    def __init__(self, port: int, context: ssl.SSLContext, limits: Limits) -> None:
        self.url = httpx.URL(f"https://127.0.0.1:{port}")
        self._timeouts = httpx.Timeout(limits.answer, connect=5.0).as_dict()
        pool = httpx.Limits(
            max_connections=limits.connections,
            max_keepalive_connections=limits.connections,
            keepalive_expiry=2.0,  # before the 5 s of the SuperLink: it never closes one as a request sets out
        )
        self._transport = httpx.AsyncHTTPTransport(verify=context, limits=pool, trust_env=False)

    async def ask(self, request: h11.Request, content: AsyncIterator[bytes], client: str) -> httpx.Response:
        """The answer, with its content still to be read. Raises httpx.TransportError."""
        asked = httpx.Request(
            "POST",
            self.url.copy_with(raw_path=request.target),
            headers=[*passed_on(request.headers), (b"x-forwarded-for", client.encode())],  # for the SuperLink's log
            content=content,
            extensions={"timeout": self._timeouts},
        )
        return await self._transport.handle_async_request(asked)

    async def close(self) -> None:
        await self._transport.aclose()


class _Gone(Exception):
    """The client went away, or was too slow, or wrote what is no HTTP, in the middle of a request."""


class Exchange:
    """A connection as a conversation; `stop` ends it after the request under way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: str, limits: Limits) -> None:
        self.client, self.limits = client, limits
        self.waiting = True  # for a request: nothing is lost when it is cut now
        self._reader, self._writer, self._stopping = reader, writer, False
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head)

    def stop(self) -> None:
        self._stopping = True

    async def run(self, superlink: SuperLink | None) -> None:
        """Until the client or the front ends it. superlink: None where the client does not speak TLS."""
        try:
            while await self._one_request(superlink) and self._both_done() and not self._stopping:
                self._http.start_next_cycle()
        except (_Gone, OSError, ssl.SSLError, TimeoutError):
            pass  # it went away; `close` tidies up
        finally:
            await self._close()

    async def _one_request(self, superlink: SuperLink | None) -> bool:
        """Whether the connection may go on."""
        self.waiting = True
        try:
            request = await self._head()
        except h11.RemoteProtocolError as error:
            return await self._refuse(None, Refusal(error.error_status_hint, "this is not HTTP as Flower speaks it"))
        if request is None:
            return False
        self.waiting = False
        if superlink is None:
            return await self._refuse(request, PLAIN)
        if refusal := reason_to_refuse(request, self.limits):
            return await self._refuse(request, refusal)
        return await self._forward(request, superlink)

    async def _head(self) -> h11.Request | None:
        async with asyncio.timeout(self.limits.patience):
            event = await self._event()
        return event if isinstance(event, h11.Request) else None

    async def _forward(self, request: h11.Request, superlink: SuperLink) -> bool:
        try:
            answer = await superlink.ask(request, self._content(content_length(request)), self.client)
        except httpx.TransportError as error:
            late = isinstance(error, httpx.TimeoutException)
            log.warning("the SuperLink at %s did not answer (%s)", superlink.url, error or type(error).__name__)
            return await self._refuse(request, Refusal(504 if late else 502, "the SuperLink does not answer: it may be starting"))
        try:
            await self._send(h11.Response(status_code=answer.status_code, headers=passed_on(answer.headers.raw)))
            async for piece in answer.aiter_raw(PIECE):
                await self._send(h11.Data(data=piece))
            await self._send(h11.EndOfMessage())
        except httpx.TransportError as error:
            raise _Gone from error  # half an answer is out: cutting it short is the only way to say so
        finally:
            await answer.aclose()
        return True

    async def _content(self, size: int) -> AsyncIterator[bytes]:
        deadline = asyncio.get_running_loop().time() + self.limits.seconds_for(size)
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await self._event()
            except h11.RemoteProtocolError as error:
                raise _Gone from error
            if not isinstance(event, h11.Data):
                return
            yield bytes(event.data)

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(PIECE))
        return event

    async def _send(self, event: h11.Event) -> None:
        if data := self._http.send(event):
            self._writer.write(data)
            async with asyncio.timeout(self.limits.seconds_for(len(data))):
                await self._writer.drain()

    async def _refuse(self, request: h11.Request | None, refusal: Refusal) -> bool:
        """As Flower's own errors look, so that its client shows the sentence. False: the connection may not go on."""
        self.waiting = False
        what = f"{request.method.decode()} {request.target.decode()[:200]}" if request else "what is no request"
        log.info("refused %s of %s: %d, %s", what, self.client, refusal.status, refusal.reason)
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        content = json.dumps({"code": refusal.status, "detail": refusal.reason}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        await self._send(h11.Response(status_code=refusal.status, headers=headers))
        if request is None or request.method != b"HEAD":
            await self._send(h11.Data(data=content))
        await self._send(h11.EndOfMessage())
        async with asyncio.timeout(self.limits.linger):
            while await self._reader.read(PIECE):
                pass
        return False

    def _both_done(self) -> bool:
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _close(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(self.limits.linger):
                await self._writer.wait_closed()
        except (OSError, ssl.SSLError, TimeoutError):
            self._writer.transport.abort()
