"""The SuperLink behind the front, on this machine's loopback."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator

import h11
import httpx

from cotune.server.proxy.allowed_calls import Limits, forwarded_headers


class SuperLink:
    """A client of the SuperLink. It speaks TLS: with SuperNode authentication the SuperLink takes nothing else.

    Args:
        port: Of the SuperLink on 127.0.0.1.
        context: Verifies its certificate.
        limits: Of connections and times.
    """

    def __init__(self, port: int, context: ssl.SSLContext, limits: Limits) -> None:
        self.url = httpx.URL(f"https://127.0.0.1:{port}")
        self._timeouts = httpx.Timeout(limits.answer, connect=5.0).as_dict()
        pool = httpx.Limits(
            max_connections=limits.connections,
            max_keepalive_connections=limits.connections,
            keepalive_expiry=2.0,  # before the 5 s of the SuperLink: it never closes one as a request sets out
        )
        self._transport = httpx.AsyncHTTPTransport(verify=context, limits=pool, trust_env=False)

    async def ask(self, request: h11.Request, content: AsyncIterator[bytes] | bytes, client: str) -> httpx.Response:
        """Forward a request.

        Args:
            request: Its head.
            content: Its content.
            client: The client's address, for the SuperLink's log.

        Returns:
            The answer, with its content still to be read.

        Raises:
            httpx.TransportError: If the SuperLink does not answer.
        """
        asked = httpx.Request(
            "POST",
            self.url.copy_with(raw_path=request.target),
            headers=[*forwarded_headers(request.headers), (b"x-forwarded-for", client.encode())],  # for the SuperLink's log
            content=content,
            extensions={"timeout": self._timeouts},
        )
        return await self._transport.handle_async_request(asked)

    async def close(self) -> None:
        await self._transport.aclose()
