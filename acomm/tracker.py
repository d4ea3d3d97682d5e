"""Tracker: requests that are sent, by us or passed on for others, and the socket at which answers come.

    call ----- request --> service            the request's hook is our own socket
      |                       |
      +-- track(id, timeout)  |
                              v
    handlers <- table <- response, over our own UnixListener

The table, and what happens when its answers come, is in `acomm.tracking`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Protocol

import msgspec

from acomm import socketpath, within
from acomm.acks import ok_ack
from acomm.channel import DEFAULT_TIMEOUT, Channels
from acomm.connection import Connection
from acomm.errors import (
    AcommError,
    BadRequest,
    CallTimeout,
    ConfigError,
    ConnectionLost,
    Forbidden,
    printable,
)
from acomm.listener import UnixListener
from acomm.messages import Request, Response
from acomm.outgoing import Outgoing
from acomm.parcel import Finished
from acomm.tracking import TimedOut, Tracking
from acomm.transport import Done
from acomm.urls import replace_localhost, unix_path

if TYPE_CHECKING:
    from aiohttp import web

    from acomm.egress import Policy
    from acomm.origin import Origin

log = logging.getLogger("acomm.tracker")

_KEY_BYTES = 16
_NO_PROXY = "no answer can come over HTTP here: the tracker has no external_proxy_url"

_response_acks = {
    (wire, extended): ok_ack(b'""', wire, extended) for wire in (2, 3) for extended in (False, True)
}


class Answer(Protocol):
    """What `Tracker.post` resolves: an asyncio.Future of a Response, or something like it."""

    def done(self) -> bool: ...
    def set_result(self, result: Response, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


class Tracker(Tracking):
    """Matches responses to requests by their id, and runs the requests' handlers.

    It listens at `socket_path` (None: a private one of its own) for responses; `url` is the hook to
    put into requests. `default_timeout` is in seconds. `wire` is the generation that it speaks first.
    Handlers that are plain functions run in threads of `executor` (None: the event loop's own). `policy`
    judges the URLs of requests that are tracked with an origin.

    For services beyond this host: `http_stream_url` is where `stream_proxy` is served, and
    `external_proxy_url` where `handle_external`'s door is, both as those services reach them.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        *,
        http_stream_url: str | None = None,
        external_proxy_url: str | None = None,
        default_timeout: float = 60.0,
        wire: int = 3,
        ack_timeout: float = DEFAULT_TIMEOUT,
        executor: Executor | None = None,
        policy: Policy | None = None,
    ) -> None:
        if not 0 < default_timeout <= math.inf:
            raise ValueError(f"default_timeout must be a positive number of seconds, not {default_timeout}")
        if wire not in (1, 2, 3):
            raise ValueError(f"wire must be 1, 2 or 3, not {wire!r}")
        super().__init__(
            Channels(timeout=ack_timeout, policy=policy), http_stream_url=http_stream_url, executor=executor
        )
        self.default_timeout = default_timeout
        self.wire = wire
        self.external_proxy_url = external_proxy_url
        self._listener = UnixListener(socket_path, on_message=self._message)
        self._identity = os.urandom(_KEY_BYTES)
        self._unacknowledged = 0
        self._all_acknowledged = asyncio.Event()
        self._all_acknowledged.set()

    def __repr__(self) -> str:
        state = self._listener.path if self._started else "stopped"
        return f"<Tracker {state}, {len(self._table)} requests>"

    # -- life ---------------------------------------------------------------------------------------

    @property
    def addr(self) -> str:
        """The path of the response socket."""
        return self._listener.addr

    @property
    def url(self) -> str:
        """The URL of the response socket: the response hook of tracked requests."""
        return self._listener.url

    def be(self, identity: bytes) -> None:
        """Be for other services what all were that had this `identity`, 16 secret bytes, before: with their
        hooks in requests that are passed on, so that one that is passed on again is no other request, and the
        answer to an earlier one finds us. Before `start`; raises ConfigError.
        """
        from hashlib import blake2b

        name = blake2b(identity, digest_size=6, person=b"path").hexdigest()
        self._listener.path = socketpath.lasting_path("answers", name)
        self._identity = identity

    async def start(self) -> None:
        """Begin to listen for responses. Raises AddressInUse or ConfigError."""
        await self._listener.start()
        self._started = True

    async def stop(self, timeout: float | None = None) -> None:
        """Track no more; wait, at most `timeout` seconds (None: until the last has its answer or has
        timed out), for what is tracked; then close. What is left gets a ConnectionLost response.
        """
        self._started = False
        await self._end(timeout)
        self.delivery.stop()
        await self._listener.stop(0)
        await self.channels.close()

    async def __aenter__(self) -> Tracker:
        await self.start()
        return self

    async def __aexit__(self, kind: object, *rest: object) -> None:
        await self.stop(None if kind is None else 0)

    def track_request(self, request: Request, timeout: float | None = None) -> Done[None]:
        """Expect the response to `request` within `timeout` seconds (None: the default timeout); at the
        timeout its error handler runs with a CallTimeout. It acts at once; awaiting it is optional.

        Raises Conflict when the id is tracked already, RuntimeError when the tracker is not running.
        """
        self.track(request, self.default_timeout if timeout is None else timeout)
        return Done(None)

    def _message(self, conn: Connection, data: bytes) -> None:
        """A response has come in at our socket: acknowledge it, then settle it."""
        try:
            response = Response.decode(data)
        except BadRequest as error:
            log.warning("a response from pid %d is not readable: %s", conn.peer.pid, printable(error))
            if not conn.raw:
                conn.write_message(Response("", error=error).encode(3))
            return
        if not conn.raw:
            wire = 2 if b'"stream_url"' in data else 3
            conn.acknowledge(_response_acks[wire, response.extended], grants=response.extended)
        self.settle(response)

    # -- requests -----------------------------------------------------------------------------------

    async def proxy_unix(self, request: Request, timeout: float | None = None) -> Request:
        """A request for local services, whose answer comes back through this tracker, and whose stream is
        read through it.

        What is a unix URL already stays as it is. Any other hook is replaced by our own, and the request
        tracked; the response is then passed on to the original hook. Any other stream is read when the
        service asks for it.
        """
        if request.stream_url is not None and unix_path(request.stream_url) is None:
            request = self._with_unix_stream(request, None, timeout or self.default_timeout)
        if request.response_hook is None or unix_path(request.response_hook) is not None:
            return request
        self.track(request, self.default_timeout if timeout is None else timeout, proxied=True)
        return msgspec.structs.replace(request, response_hook=self.url, on_success=None, on_error=None)

    async def proxy_external(self, request: Request, timeout: float | None = None) -> Request:
        """A request for services beyond this host: tracked here, and returned as what to send to them.

        Its hook is `external_proxy_url`; a stream at a unix socket is read through `stream_proxy`. The
        response is passed on to the original hook. Raises ConfigError when one of the two is needed
        and not set.
        """
        external = self._external(request, "")
        timeout = self.default_timeout if timeout is None else timeout
        self.track(request, timeout, proxied=True, external="")
        return external

    def _external(self, request: Request, key: str) -> Request:
        hook = self.external_proxy_url
        if hook is None:
            raise ConfigError(_NO_PROXY)
        if key:
            hook += f"{'&' if '?' in hook else '?'}key={key}"
        stream = request.stream_url
        if stream is not None and unix_path(stream) is not None:
            stream = self.proxy_stream_http_url(stream)
        return _for_the_next(request, hook, stream)

    def _with_unix_stream(self, request: Request, origin: Origin | None, expiry: float) -> Request:
        from acomm.egress import Guard
        from acomm.streamreaders import open_stream

        assert request.stream_url is not None
        policy = self.channels.policy
        guard = None if policy is None or origin is None else Guard(policy, origin)
        source = open_stream(request.stream_url, guard=guard)
        return msgspec.structs.replace(request, stream_url=self.new_stream_unix(source, expiry=expiry).result)

    def forward(
        self,
        request: Request,
        timeout: float,
        *,
        origin: Origin | None = None,
        resolve: Callable[[Response], None] | None = None,
        delivered: Finished | None = None,
        proxied: bool = True,
    ) -> None:
        """Have the service at the request's task URL serve it, and pass its answer on to the hook, if it is
        `proxied`, and to `resolve`; `delivered` is that of `track`. `origin` has chosen the URLs. What goes
        wrong, and the service's refusal, is the answer. Raises Conflict, and ConfigError when HTTP is needed
        and not set up.

        Hook and stream of the request are replaced by our own: the next service judges them by who we are.
        """
        url = request.task_url
        assert url is not None
        # Its sender has chosen the id, which anybody may guess who reaches our door.
        external = self._key(request.id, url) if unix_path(url) is None else None
        if external and self.external_proxy_url is None:
            raise ConfigError(_NO_PROXY)
        through = request

        def answered(response: Response) -> None:
            if response.error is not None and through is not request and self._streams is not None:
                # It may never have been sent, and a stream that nobody comes for would wait all the while.
                self._streams.expire(through.stream_url or "")
            if resolve is not None:
                resolve(response)

        self.track(
            request,
            timeout,
            proxied=proxied,
            resolve=answered,
            origin=origin,
            external=external,
            delivered=delivered,
        )
        try:
            if request.stream_url is not None:
                through = self._with_unix_stream(request, origin, timeout)
            if external:
                outgoing = self._external(through, external)
            else:
                outgoing = _for_the_next(through, self.url, through.stream_url)
        except AcommError as error:
            # Not before we return: whoever called may have to note first that there is a request.
            answer = Response(request.id, error=error)
            asyncio.get_running_loop().call_soon(self.settle, answer)
            return
        except BaseException:
            self._take(request.id)  # whoever called is told by this, and not once more at the timeout
            raise

        def acknowledged(error: AcommError | None) -> None:
            if error is not None:
                self.settle(Response(request.id, error=error))

        payload = outgoing.encode(3, extended=True)
        self.channels.post(url, Outgoing(payload, acknowledged, wire=3, extended=True), origin)

    def _key(self, id: str, url: str) -> str:
        """What shows that an answer is from the service at `url`, to which this request was sent."""
        from hashlib import blake2b

        text = f"{id}\0{url}".encode("utf-8", "surrogatepass")
        return blake2b(text, digest_size=_KEY_BYTES, key=self._identity).hexdigest()

    def handle_external(self, data: bytes, address: str | None = None, key: str = "") -> bytes:
        """A response from beyond this host, as its JSON: settles the request that was sent there, and
        returns the acknowledgement. `address` is the peer's, for streams that it calls "localhost"; `key` is
        that of the URL's query.

        Only requests of `proxy_external` and `forward` are answered from outside, and those of `forward` only
        by who was told the key. Whether there was one is not told, as the id may be a guess.
        """
        try:
            response = Response.decode(data)
        except BadRequest as error:
            return Response("", error=error).encode(3)
        entry = self._table.get(response.id)
        if entry is not None and entry.external is not None and _fits(entry.external, key):
            self.settle(_from_outside(response, address))
        else:
            log.debug("an answer from outside to the request %s is not awaited", printable(response.id))
        return _response_acks[2 if b'"stream_url"' in data else 3, response.extended]

    async def external_handler(self, request: web.Request) -> web.Response:
        """`handle_external` as a handler of aiohttp's, to be mounted at `external_proxy_url`."""
        from aiohttp import web

        ack = self.handle_external(await request.read(), request.remote, request.query.get("key", ""))
        return web.Response(body=ack, content_type="application/json")

    async def call(self, url: str, request: Request, timeout: float | None = None) -> Response:
        """Send `request` to the service at `url` and wait for its response.

        The response hook is set to our own unless the request has one. Raises the error of a refused
        acknowledgement, ConnectionLost, or CallTimeout after `timeout` seconds (None: the request's own
        timeout and a moment more, else the default). A response that carries an error is returned.

        Within a task its time is at most what the task's own request has left. See `acomm.detached`.
        """
        due = within.limit()
        if due is not None:
            left = due - time.monotonic()
            if left <= 0:
                raise CallTimeout("the task that makes this call has no time left for it")
            asked = request.timeout if timeout is None else timeout
            if left < (self.default_timeout if asked is None else asked):
                request, timeout = msgspec.structs.replace(request, timeout=left), left
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        id = self.post(url, request, answer, timeout)
        try:
            response = await answer
        finally:
            if not answer.done() or answer.cancelled():
                self._take(id)
        if isinstance(response.error, TimedOut | ConnectionLost):
            raise response.error
        return response

    def post(
        self,
        url: str,
        request: Request,
        answer: Answer,
        timeout: float | None = None,
        *,
        accepted: Callable[[bytes], None] | None = None,
    ) -> str:
        """Send `request` and have `answer` resolved with its response, or with the error of a refused
        acknowledgement. `accepted` is given one that was not refused, as it came. Returns the id.
        """
        if request.response_hook is None:
            request = msgspec.structs.replace(request, response_hook=self.url)
        if timeout is None:
            timeout = self.default_timeout if request.timeout is None else request.timeout + 1.0
        payload = request.encode(self.wire, extended=self.wire > 1)
        id = request.id

        def resolve(response: Response) -> None:
            if not answer.done():
                answer.set_result(response)

        def acknowledged(error: AcommError | None) -> None:
            self._unacknowledged -= 1
            if not self._unacknowledged:
                self._all_acknowledged.set()
            if error is None:
                if accepted is not None:
                    accepted(message.ack)
                if (entry := self._table.get(id)) is not None:
                    entry.acknowledged = True
            elif self._take(id) is not None and not answer.done():
                answer.set_exception(error)

        self.track(request, timeout, resolve=resolve)
        expected = ok_ack(msgspec.json.encode(id), self.wire, True)[:-1]  # what is accepted tells more
        extended = self.wire > 1
        message = Outgoing(payload, acknowledged, wire=self.wire, extended=extended, expected=expected)
        self._unacknowledged += 1
        self._all_acknowledged.clear()
        try:
            self.channels.post(url, message)
        except BaseException as error:
            self._take(id)
            acknowledged(error if isinstance(error, AcommError) else None)
            raise
        return id

    async def acknowledged(self) -> None:
        """Wait until every request that was sent has been acknowledged or has failed."""
        await self._all_acknowledged.wait()


def _for_the_next(request: Request, hook: str, stream: str | None) -> Request:
    """The request as it is sent on: what is ours to do, with it or its answer, stays here."""
    return msgspec.structs.replace(
        request,
        response_hook=hook,
        stream_url=stream,
        task_url=None,
        on_success=None,
        on_error=None,
        handlers=None,
    )


def _fits(wanted: str, key: str) -> bool:
    from hmac import compare_digest

    return not wanted or compare_digest(wanted.encode(), key.encode("utf-8", "replace"))


def _from_outside(response: Response, address: str | None) -> Response:
    """An answer as it may be passed on: from beyond this host nobody can tell us of its unix sockets."""
    url = response.stream_url
    if url is None:
        return response
    if unix_path(url) is not None:
        error = Forbidden("the service has answered with a stream at a unix socket, over HTTP")
        return Response(response.id, error=error, extended=response.extended)
    if address is not None:
        url = replace_localhost(url, address)
    return msgspec.structs.replace(response, stream_url=url)
