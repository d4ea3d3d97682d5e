"""Outgoing messages: one connection a message for strangers, a pipelined channel for our own kind.

    post -> Channel (one a URL) -+- granted:  one connection, many frames unacknowledged on it
                                 +- else:     one connection a message, at most PLAIN_CONNECTIONS
                                 +- http(s):  one POST a message

Here are all the channels of one owner; one of them is an `acomm.unixchannel` or an `acomm.httpchannel`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from acomm import messages, urls
from acomm.errors import AcommError, ConnectionLost
from acomm.httpchannel import HTTP_CONNECTIONS, HttpChannel
from acomm.messages import Request, Response, encode_payload
from acomm.outgoing import Channel, Outgoing
from acomm.unixchannel import UnixChannel

if TYPE_CHECKING:
    import aiohttp

    from acomm.egress import Policy
    from acomm.origin import Origin

DEFAULT_TIMEOUT = 30.0
"""Seconds to connect, and again for the acknowledgement to come."""


class Channels:
    """All the channels of one owner, by URL and origin. Closing it fails what is still under way.

    `policy` judges where URLs may lead that come with an origin; those without are the program's own.
    `broken(url)`, if set, is called when a peer has ended a connection that it had granted; `storing` has the
    URLs whose peers say on their connection that they store requests. `headers` are what POSTs to a URL carry
    besides, by URL.
    """

    def __init__(self, *, timeout: float = DEFAULT_TIMEOUT, policy: Policy | None = None) -> None:
        self.timeout = timeout
        self.policy = policy
        self.granting: OrderedDict[str, bool] = OrderedDict()
        self.broken: Callable[[str], None] | None = None
        self.storing: set[str] = set()
        self.headers: dict[str, dict[str, str]] = {}
        self._channels: dict[tuple[str, Origin | None], Channel] = {}
        self._http: dict[bool | None, aiohttp.ClientSession] = {}
        self.closed = False

    def __repr__(self) -> str:
        return f"<Channels {len(self._channels)} open>"

    def __len__(self) -> int:
        return len(self._channels)

    def post(self, url: str, message: Outgoing, origin: Origin | None = None) -> None:
        """Send a message; its `delivered` is told how it went. `origin` is whoever chose the URL, None if
        it was this program: what the policy forbids is then not connected to, and `delivered` is told
        Forbidden. Raises BadRequest for a URL that nothing can be sent to. Never blocks.
        """
        if self.closed:
            message.settle(ConnectionLost("the sender is closed"))
            return
        channel = self._channels.get((url, origin))
        if channel is None:
            urls.check(url, "the URL")
            if origin is not None and self.policy is None:
                raise RuntimeError("a URL of another origin needs a policy")
            path = urls.unix_path(url)
            channel = HttpChannel(self, url, origin) if path is None else UnixChannel(self, url, path, origin)
            self._channels[url, origin] = channel
        channel.post(message)

    def connected(self, url: str, origin: Origin | None) -> bool:
        """Whether there is an open connection to `url`, which was judged when it was made."""
        channel = self._channels.get((url, origin))
        return isinstance(channel, UnixChannel) and channel.live is not None

    async def send(self, url: str, payload: Any, wire: int = 3) -> None:
        """Send a payload and wait for its acknowledgement. Raises its error, or ConnectionLost."""
        extended = _may_extend(payload, wire)
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def delivered(error: AcommError | None) -> None:
            if not acknowledged.done():
                acknowledged.set_result(None) if error is None else acknowledged.set_exception(error)

        data = encode_payload(payload, wire, extended=extended)
        self.post(url, Outgoing(data, delivered, wire=wire, extended=extended))
        await acknowledged

    async def close(self) -> None:
        """Close all connections; what is unacknowledged fails with ConnectionLost."""
        self.closed = True
        for channel in list(self._channels.values()):
            await channel.close()
        self._channels.clear()
        while self._http:
            await self._http.popitem()[1].close()

    def http(self, origin: Origin | None) -> aiohttp.ClientSession:
        """The session for URLs of `origin`: one for all origins that may reach the same."""
        kind = None if origin is None else origin.local
        if kind not in self._http:
            self._http[kind] = self._new_session(origin)
        return self._http[kind]

    def _new_session(self, origin: Origin | None) -> aiohttp.ClientSession:
        from acomm import httpegress
        from acomm.egress import Guard

        if origin is None or self.policy is None:
            guard = None
        else:
            guard = Guard(self.policy, origin)
        return httpegress.session(guard, timeout=self.timeout, limit_per_host=2 * HTTP_CONNECTIONS)

    def idle(self, channel: Channel) -> None:
        """A channel has nothing under way and no connection: forget it, so that short-lived hooks leave
        nothing behind.
        """
        key = channel.url, channel.origin
        if self._channels.get(key) is channel:
            del self._channels[key]

    def learned(self, url: str, granting: bool) -> None:
        """Remember whether the peer at `url` grants channels."""
        self.granting[url] = granting
        self.granting.move_to_end(url)
        if len(self.granting) > 1024:
            self.granting.popitem(last=False)


def _may_extend(payload: Any, wire: int) -> bool:
    """Whether a message may carry `"acomm": 1`: requests of ours, responses to who asked for it."""
    if wire == 1:
        return False
    return isinstance(payload, Request) or (isinstance(payload, Response) and payload.extended)


async def send(url: str, payload: Any, *, wire: int = 3, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Send a Request, a Response or any JSON value to a `unix://`, `http://` or `https://` URL.

    Returns when it is acknowledged; generation 1 knows no acknowledgement, there it returns when the
    message is written. Raises the acknowledgement's error, ConnectionLost when none came within
    `timeout` seconds, BadRequest for a URL that nothing can be sent to.
    """
    if isinstance(payload, Request) and urls.unix_path(url) is not None:
        # We close the connection behind the acknowledgement, and the answer is for whoever is at the hook.
        payload = msgspec.structs.replace(payload, detached=True)
    channels = Channels(timeout=timeout)
    try:
        await channels.send(url, payload, wire)
    finally:
        await channels.close()


def send_sync(url: str, payload: Any, *, wire: int = 3, timeout: float = DEFAULT_TIMEOUT) -> None:
    """`send` for programs without an event loop. Raises RuntimeError inside one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(send(url, payload, wire=wire, timeout=timeout))
    else:
        raise RuntimeError("send_sync would block the event loop that it is called in: await send instead")


async def _respond(url: str, payload: Response, wire: int) -> None:
    await send(url, payload, wire=wire)


messages.set_transport(_respond)
