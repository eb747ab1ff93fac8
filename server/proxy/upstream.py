"""HTTP client for the SuperLink behind the front, on this machine's loopback interface."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator

import h11
import httpx

from cotune.server.proxy.allowed_calls import forwarded_headers
from cotune.server.proxy.limits import Limits


class SuperLink:
    """An HTTP client for the SuperLink. It uses TLS, without which the SuperLink does not authenticate SuperNodes.

    Args:
        port: Of the SuperLink on 127.0.0.1.
        context: TLS context that verifies its certificate.
        limits: For connections and timeouts.
    """

    def __init__(self, port: int, context: ssl.SSLContext, limits: Limits) -> None:
        self.url = httpx.URL(f"https://127.0.0.1:{port}")
        self._timeouts = httpx.Timeout(limits.answer, connect=5.0).as_dict()
        pool = httpx.Limits(
            max_connections=limits.connections,
            max_keepalive_connections=limits.connections,
            keepalive_expiry=2.0,  # below the SuperLink's 5 s, so that it never closes a connection just as a request is sent
        )
        self._transport = httpx.AsyncHTTPTransport(verify=context, limits=pool, trust_env=False)

    async def ask(self, request: h11.Request, content: AsyncIterator[bytes] | bytes, client: str) -> httpx.Response:
        """Forward a request.

        Args:
            request: Its head.
            content: Its content.
            client: The client's address, for the SuperLink's log.

        Returns:
            The answer; its content is not read yet.

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
        """Close all connections."""
        await self._transport.aclose()
