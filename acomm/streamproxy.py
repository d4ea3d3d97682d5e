"""Streams over HTTP: a proxy that serves the URLs which it has signed, each once."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import struct
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Mapping,
)
from contextlib import aclosing
from typing import TYPE_CHECKING

from acomm import urls
from acomm.deadlines import Deadlines
from acomm.errors import BadRequest, ConnectionLost, Forbidden, printable
from acomm.streamreaders import SILENCE, open_stream

# aiohttp is for HTTP streams alone, and takes longer to import than all the rest.
if TYPE_CHECKING:
    from aiohttp import web

    from acomm.egress import Guard

log = logging.getLogger("acomm.streams")

STALL = 60.0
"""Seconds that an HTTP reader of a stream may take nothing before it is cut off."""

_LIFETIME = 3600.0
_NONCE_BYTES = 8
_PLAIN_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class StreamProxy:
    """Serves streams to HTTP readers: those alone whose URL it has signed, and each once.

    `base_url` is where `serve` is mounted, as readers reach it. With one `secret` (bytes, at least 16)
    several processes of one host can share the work, though then "once" holds for each of them;
    by default it is a new one. `clock` is monotonic, in seconds. `guard` judges once more where a URL
    leads when it is used.

        proxy = StreamProxy("http://host:8080/stream")
        application.router.add_get("/stream", proxy.serve)
        Response(id, stream_url=proxy.sign(url))

    Run the application with `handler_cancellation=True`, or a reader that leaves is noticed only when
    there is more to send. One that takes nothing for `stall` seconds is cut off.
    """

    def __init__(
        self,
        base_url: str,
        secret: bytes | None = None,
        *,
        timeout: float | None = SILENCE,
        stall: float = STALL,
        clock: Callable[[], float] = time.monotonic,
        guard: Guard | None = None,
    ) -> None:
        urls.check(base_url, "the stream proxy's URL")
        if urls.scheme_of(base_url) not in ("http", "https"):
            raise BadRequest(f"the stream proxy's URL must be an HTTP one, not {printable(base_url)}")
        if secret is not None and len(secret) < 16:
            raise ValueError("the stream proxy's secret must have at least 16 bytes")
        self.base_url = base_url
        self.timeout = timeout
        self.stall = stall
        self._secret = os.urandom(32) if secret is None else secret
        self._clock = clock
        self._guard = guard
        self._used: Deadlines[str] = Deadlines()

    def sign(self, url: str, *, lifetime: float = _LIFETIME) -> str:
        """An HTTP URL that gives the stream at `url` to the first who asks, within `lifetime` seconds.

        Raises BadRequest for a URL that no stream can be at.
        """
        from urllib.parse import urlencode

        urls.check(url, "the stream URL")
        if not 0 < lifetime < math.inf:  # what was used is remembered until it expires
            raise ValueError(f"lifetime must be a positive number of seconds, not {lifetime}")
        signed = {
            "addr": url,
            "expires": f"{self._clock() + lifetime:.3f}",
            "nonce": os.urandom(_NONCE_BYTES).hex(),
        }
        query = urlencode(signed | {"sig": self._signature(*signed.values())})
        proxied = f"{self.base_url}{'&' if '?' in self.base_url else '?'}{query}"
        urls.check(proxied, "the signed URL")
        return proxied

    def verify(self, query: Mapping[str, str]) -> str:
        """The URL that the query of a signed one is for. It has then been used.

        Raises Forbidden for a query that is not signed, was changed, has expired, or was used before.
        """
        import hmac

        signed = [query.get(key, "") for key in ("addr", "expires", "nonce")]
        signature = self._signature(*signed)
        if not hmac.compare_digest(signature.encode(), query.get("sig", "").encode("utf-8", "replace")):
            raise Forbidden("the stream's URL is not signed by this service")
        now, expires = self._clock(), float(signed[1])
        if expires <= now:
            raise Forbidden("the stream's URL has expired")
        self._used.expired(now)
        if signature in self._used:
            raise Forbidden("the stream's URL was used before")
        self._used.set(signature, expires)
        return signed[0]

    def _signature(self, *parts: str) -> str:
        import hmac

        # None of ours has a line feed in it, so nothing else joins to the same text.
        text = "\n".join(parts).encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, text, "sha256").hexdigest()

    async def serve(
        self, request: web.BaseRequest, headers: Mapping[str, str] = _PLAIN_HEADERS
    ) -> web.StreamResponse:
        """Answer a request for a signed URL, as a handler of aiohttp's. `headers` go with every answer.

        403 for a URL that is not ours; 502 when the stream fails before its first byte. When it fails
        later the connection is reset, so that no reader takes what it has for the whole.
        """
        from aiohttp import web

        if request.method != "GET":  # HEAD must not use the stream up
            allowed = {**headers, "Allow": "GET"}
            return web.Response(status=405, headers=allowed, text="a stream can only be read\n")
        try:
            url = self.verify(request.query)
        except Forbidden as error:
            return web.Response(status=403, headers=headers, text=f"{error}\n")
        async with aclosing(open_stream(url, timeout=self.timeout, guard=self._guard)) as chunks:
            try:
                first = await anext(chunks, b"")
            except (ConnectionLost, Forbidden) as error:
                log.warning("a stream cannot be proxied: %s", error)
                return web.Response(status=502, headers=headers, text="the stream cannot be read\n")
            headers = {"Content-Type": "application/octet-stream", **headers}
            return await pass_on(request, first, chunks, headers=headers, stall=self.stall)


async def pass_on(
    request: web.BaseRequest,
    first: bytes,
    rest: AsyncIterator[bytes],
    *,
    headers: Mapping[str, str],
    stall: float = STALL,
) -> web.StreamResponse:
    """Answer an HTTP request with `first` and the chunks of `rest`. When those break off, or when the
    reader takes nothing for `stall` seconds, the connection is reset.
    """
    from aiohttp import web

    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    try:
        if first:
            await _write_within(response, first, stall)
        async for chunk in rest:
            await _write_within(response, chunk, stall)
    except ConnectionLost as error:
        log.warning("a proxied stream broke: %s", error)
        _reset(request)
    except TimeoutError:
        log.warning("the reader of a proxied stream has taken nothing for %g seconds", stall)
        _reset(request)
    except ConnectionError:
        pass  # the reader has left
    return response


async def _write_within(response: web.StreamResponse, chunk: bytes, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await response.write(chunk)


def _reset(request: web.BaseRequest) -> None:
    """End the connection by a reset: HTTP/1.0 readers, proxies among them, take any other end for clean."""
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
