"""Messages to one HTTP URL, a POST each; the reply's body is the acknowledgement."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from acomm.errors import AcommError, BadRequest, ConnectionLost, Unreachable, printable
from acomm.messages import Response
from acomm.outgoing import Channel, Outgoing

if TYPE_CHECKING:
    import aiohttp

HTTP_CONNECTIONS = 32
UNPROVEN_HTTP_CONNECTIONS = 8
"""POSTs to one URL at a time: the fewer until it has answered, one more for each answer. A host lends twice
the most of one URL, so that one which takes connections and says nothing leaves as many to the others.
"""

_MAX_REPLY = 1024 * 1024


class HttpChannel(Channel):
    """Messages to one HTTP URL, a POST each."""

    limit = UNPROVEN_HTTP_CONNECTIONS

    def post(self, message: Outgoing) -> None:
        self.queue.append(message)
        self.more()

    async def _run(self, message: Outgoing) -> AcommError | None:
        error = await super()._run(message)
        if isinstance(error, ConnectionLost):
            self.limit = UNPROVEN_HTTP_CONNECTIONS
        else:
            self.limit = min(self.limit + 1, HTTP_CONNECTIONS)
        return error

    async def exchange(self, message: Outgoing) -> AcommError | None:
        import aiohttp

        where = printable(self.url)
        if self.origin is not None and self.owner.policy is not None:
            self.owner.policy.check(self.url, self.origin)  # as it stands: aiohttp reads some kindly
        try:
            async with self.owner.http(self.origin).post(
                self.url,
                data=message.payload,
                headers={"Content-Type": "application/json", **self.owner.headers.get(self.url, {})},
                allow_redirects=False,
            ) as reply:
                if message.wire == 1:  # this generation looks at the status alone
                    ok = reply.status == 200
                    return None if ok else ConnectionLost(f"{where} answered status {reply.status}")
                body = await _read_body(reply)
        except aiohttp.ClientError as error:
            connecting = isinstance(error, aiohttp.ClientConnectorError)
            nobody_there = connecting and not isinstance(error, aiohttp.ClientSSLError)
            kind = Unreachable if nobody_there else ConnectionLost
            raise kind(f"cannot reach {where}: {_why_not(error)}") from None
        try:
            ack = Response.decode(body)
        except BadRequest:
            return ConnectionLost(f"{where} answered status {reply.status} without an acknowledgement")
        if ack.error is None and reply.status >= 300:
            return ConnectionLost(f"{where} answered status {reply.status}")
        message.ack = body
        return ack.error


def _why_not(error: aiohttp.ClientError) -> object:
    """What the system says of a connection that failed; aiohttp's words repeat the address."""
    import aiohttp

    if not isinstance(error, aiohttp.ClientConnectorError) or isinstance(error, aiohttp.ClientSSLError):
        return error
    number = error.os_error.errno
    if isinstance(error, aiohttp.ClientConnectorDNSError) or not number or number < 0:
        return error.os_error.strerror or error
    return os.strerror(number)


async def _read_body(reply: aiohttp.ClientResponse) -> bytes:
    """The whole body; `content.read(n)` returns what has come so far. Raises ConnectionLost when it is
    longer than any acknowledgement.
    """
    body = bytearray()
    async for chunk in reply.content.iter_any():
        body += chunk
        if len(body) > _MAX_REPLY:
            raise ConnectionLost(f"the acknowledgement is longer than {_MAX_REPLY} bytes")
    return bytes(body)
