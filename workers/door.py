"""The HTTP door: the supervisor's requests over HTTP, for callers on other hosts and for those without hooks.

    POST /            a request as on the unix socket; the answer is its acknowledgement
    POST /call/TASK   the arguments; the answer is the result, when the task has ended
    GET  /stream      a stream whose URL was signed here        POST /proxy   answers of services elsewhere
    GET  /healthz, /readyz, /openapi.json

Every request passes the same gate before a byte of its body is read: is there room, is it our Host and
Origin, does the route want the token and is it shown. At `/`, where peers such as the original look at
the body alone, a refusal has status 200 and the form of an acknowledgement; elsewhere it has a status,
by `httpreplies.STATUSES`, and `{"error": ...}`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from aiohttp import web

from acomm import jsontext
from acomm.accepted import Accepted
from acomm.acks import ok_ack, salvage
from acomm.listener import stop_accepting
from acomm.messages import Request, Response
from acomm.origin import Origin
from acomm.streamproxy import pass_on
from acomm.streamreaders import decline, open_stream
from workers import httpconnections
from workers import httpreplies as replies
from workers.config import HTTP_CONNECTIONS
from workers.errors import (
    AcommError,
    BadRequest,
    Busy,
    ConfigError,
    ConnectionLost,
    Forbidden,
    TooLarge,
    WorkerLost,
    printable,
)
from workers.httpaccess import Address, Hosts, Token, check_public_url, is_address, is_loopback, listen
from workers.httpconnections import HttpConnection
from workers.offering import Resolve, Service
from workers.openapi import STREAM_TYPES, describe
from workers.registry import Registry

log = logging.getLogger("acomm.door")

READ_TIMEOUT = 30.0
"""Seconds for a request to come whole, for a new connection to begin one, and for a kept one to stay idle."""

_AT_ONCE = 0.01  # seconds; aiohttp takes none for no limit

_CONNECTION: dict[str, Any] = {
    "access_log": None,
    "logger": log,
    "keepalive_timeout": READ_TIMEOUT,
    "auto_decompress": False,  # a small body may unfold to any size
}


class _Route(NamedTuple):
    method: str
    needs_token: bool
    handler: Callable[[web.BaseRequest, bool, str], Awaitable[web.StreamResponse]]


class Door:
    """Serves `service` at `config.http`. Raises ConfigError for settings that do not go together, and
    makes the token file if it is missing.
    """

    def __init__(self, service: Service) -> None:
        config = service.config
        assert config.http is not None
        self._service = service
        self._address = Address.parse(config.http)
        self._public = None if config.http_url is None else check_public_url(config.http_url)
        self._family, self._bind = self._address.resolve()
        self._hosts = Hosts(self._address.host, config.http_host, self._public)
        self._token: Token | None = None
        if not config.http_no_token:
            self._token = Token.load(config.http_token_file or f"{config.socket}.token")
        elif not is_loopback(self._bind[0]):
            raise _needs_token(self._address)
        self._routes = {
            "/": _Route("POST", True, self._message),
            "/call/": _Route("POST", True, self._call),
            "/stream": _Route("GET", False, self._stream),
            "/proxy": _Route("POST", False, self._proxy),
            "/healthz": _Route("GET", False, self._health),
            "/readyz": _Route("GET", False, self._ready),
            "/openapi.json": _Route("GET", True, self._openapi),
        }
        self._server: web.Server | None = None
        self._listening: asyncio.Server | None = None
        self._socket: socket.socket | None = None
        self._reading = {True: 0, False: 0}  # bytes, by whether their sender is trusted
        self._leaving = False  # each answer ends its connection
        self._document: tuple[Registry, bytes] | None = None

    def __repr__(self) -> str:
        return f"<Door {self.url}, {self.connections} connections>"

    @property
    def url(self) -> str:
        """Where it is reached; with the port that it has got if any was asked for."""
        return self._address.url()

    @property
    def connections(self) -> int:
        return 0 if self._server is None else len(self._server.connections)

    async def start(self) -> None:
        """Listen. Tells the tracker by which URLs others reach our streams and our proxy. Raises AddressInUse
        or ConfigError.
        """
        sock = self._socket = self._socket or listen(self._family, self._bind)
        self._address = Address(self._address.host, sock.getsockname()[1])
        self._server = web.Server(self._handle, handler_cancellation=True)
        await self.accept()
        base = self._public or self._base()
        self._service.tracker.http_stream_url = f"{base}/stream"
        self._service.tracker.external_proxy_url = f"{base}/proxy"

    def _base(self) -> str:
        """Where others reach us. Peers of ours put the address that they know us by in the place of
        `localhost`, which no other will do for where we listen at one address alone.
        """
        host = self._bind[0].partition("%")[0]
        address = ip_address(host)
        alone = not (address.is_loopback or address.is_unspecified)
        return Address(host if alone else "localhost", self._address.port).url()

    def adopt(self, fd: int) -> None:
        """Have `start` listen at the socket of a door that was there before us, if that is where we would."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        bound = sock.getsockname()
        if sock.family == self._family and bound[0] == self._bind[0] and self._bind[1] in (0, bound[1]):
            self._socket = sock
        else:
            sock.close()

    @property
    def fd(self) -> int:
        """The listening socket."""
        assert self._socket is not None
        return self._socket.fileno()

    async def accept(self) -> None:
        """Take connections, as `start` does, again after `pause`."""
        assert self._socket is not None
        self._leaving = False
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(self._protocol, sock=self._socket.dup())

    async def pause(self) -> None:
        """Take no more connections; who knocks waits in the kernel's queue."""
        listening, self._listening = self._listening, None
        if listening is not None:
            await stop_accepting(listening)

    def see_off(self) -> bool:
        """Have callers connect anew: from now on each answer ends its connection, and those end that rest.
        Whether callers are left who may yet ask for something; look again in a moment.
        """
        self._leaving = True
        connections = () if self._server is None else self._server.connections
        return httpconnections.see_off(connections)

    def give_away(self) -> None:
        """The socket is another process's now; our connections go on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def close(self, timeout: float) -> None:
        """Accept no more; give requests under way `timeout` seconds to be answered."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        self.give_away()
        if self._server is not None:
            self._server.pre_shutdown()
            await self._server.shutdown(max(timeout, _AT_ONCE))

    def _protocol(self) -> asyncio.Protocol:
        assert self._server is not None
        if len(self._server.connections) >= HTTP_CONNECTIONS:
            return replies.Full()
        return HttpConnection(self._server, loop=asyncio.get_running_loop(), **_CONNECTION)

    # -- the gate -----------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        with httpconnections.asking(request):
            response = await self._answer(request)
        if self._leaving:
            self._last_of(request, response)
        return response

    @staticmethod
    def _last_of(request: web.BaseRequest, response: web.StreamResponse) -> None:
        if response.prepared:
            request.protocol.close()  # what has begun could not say so
        else:
            response.force_close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        try:
            route, task = self._route(request.method, path)
            trusted = self._check(request, route)
            return await route.handler(request, trusted, task)
        except AcommError as error:
            # Under no other name, which would be left in this frame, and that is in its traceback: all that
            # the request has brought would stay until garbage is looked for.
            return self._refuse(request, path, error)
        except ConnectionError:
            raise  # the client has left
        except Exception:
            log.exception("an HTTP request could not be answered")
            fault = AcommError("the supervisor failed at this request; its log tells why")
            return self._refuse(request, path, fault)

    def _refuse(self, request: web.BaseRequest, path: str, refusal: AcommError) -> web.Response:
        self._service.refused(refusal)
        return (
            replies.acknowledgement(refusal)
            if path == "/" and request.method == "POST"
            else replies.refusal(refusal)
        )

    def _route(self, method: str, path: str) -> tuple[_Route, str]:
        task = ""
        if path.startswith("/call/"):
            path, task = "/call/", unquote(path[6:], errors="replace")
        route = self._routes.get(path)
        if route is None or (path == "/call/" and not task):
            raise replies.NoSuchPath(f"there is nothing at {printable(path)}; see /openapi.json")
        if method != route.method and not (method == "HEAD" and route.method == "GET"):
            raise replies.NotAllowed(method, route.method)
        return route, task

    def _check(self, request: web.BaseRequest, route: _Route) -> bool:
        """Whether the request may pass, and whether its sender is trusted. Raises Forbidden."""
        headers = request.headers
        host = headers.get("Host")
        if not self._hosts.allows(host) and not is_address(host, _local_address(request)):
            raise Forbidden(
                f"this service does not answer to the host {printable(host or '')}; --http-host allows a name"
            )
        origin = headers.get("Origin")
        if origin is not None and not self._hosts.same_origin(origin, host or ""):
            raise Forbidden(f"pages of {printable(origin)} may not use this service")
        if self._token is None:
            return True
        shown = self._token.fits(headers.get("Authorization"))
        if route.needs_token and not shown:
            raise replies.NoToken(
                "the token is missing or wrong: send the header Authorization: Bearer TOKEN"
            )
        return shown

    # -- routes -------------------------------------------------------------------------------------

    async def _message(self, request: web.BaseRequest, trusted: bool, _: str) -> web.StreamResponse:
        """A request in any generation; the answer is its acknowledgement."""
        data = await self._json_body(request, trusted)
        try:
            message = Request.decode(data, localhost=_peer_address(request))
        except BadRequest as error:
            self._service.refused(error)
            id, wire, extended, _hook = salvage(data)
            return replies.acknowledgement(error, id, wire, extended)
        # A generation that has no acknowledgement is the socket's affair alone.
        httpconnections.offered(request)
        refusal, accepted = await self._offer(message, trusted)
        if refusal is not None:
            return replies.acknowledgement(refusal, message.id, message.wire, message.extended)
        ack = ok_ack(msgspec.json.encode(message.id), message.wire, message.extended, accepted)
        return replies.answer(request, ack, last=self._leaving)

    async def _call(self, request: web.BaseRequest, trusted: bool, task: str) -> web.StreamResponse:
        """A call whose caller waits here. One who leaves stops it only if the task says so: it may have been
        meant.
        """
        data = await self._json_body(request, trusted, may_be_empty=True)
        args = jsontext.raw_value(data, "the arguments") if data else None
        call = Request(task, args, **_options(request))
        call.validate()
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def resolve(response: Response) -> None:
            if not answer.done():
                answer.set_result(response)
            elif response.stream_url is not None:
                decline(response.stream_url)  # the caller has left, and a worker would wait for nobody

        def gone() -> None:
            if task in self._service.registry.end_with_callers:
                self._service.callers.add(call.id, call.id)
                self._service.caller_left(call.id)

        httpconnections.offered(request)
        try:
            refusal, _ = await self._offer(call, trusted, resolve, gone)
            if refusal is not None:
                return replies.refusal(refusal)
            response = await answer
        except asyncio.CancelledError:
            if not answer.done():
                answer.cancel()
            elif not answer.cancelled():
                resolve(answer.result())
            gone()
            raise
        if response.error is not None:
            return replies.refusal(response.error)
        if response.stream_url is not None:
            return await self._piped(request, response)
        body = b"null" if response.result is None else jsontext.encode(response.result, "the result")
        return replies.answer(request, body, last=self._leaving)

    async def _offer(
        self,
        request: Request,
        trusted: bool,
        resolve: Resolve | None = None,
        gone: Callable[[], None] | None = None,
    ) -> tuple[AcommError | None, Accepted | None]:
        """Why the supervisor does not take a request, None if it has; and where that stands. `gone` is called
        if it does when its sender has left.
        """
        loop = asyncio.get_running_loop()
        decision: asyncio.Future[tuple[AcommError | None, Accepted | None]] = loop.create_future()

        def decided(refusal: AcommError | None, accepted: Accepted | None = None, /) -> None:
            if not decision.done():
                decision.set_result((refusal, accepted))
            elif refusal is None and gone is not None:
                gone()  # the peer has left meanwhile

        self._service.offer(request, Origin.http(trusted=trusted), decided, resolve)
        return await decision

    async def _piped(self, request: web.BaseRequest, response: Response) -> web.StreamResponse:
        assert response.stream_url is not None
        kind = STREAM_TYPES.get(response.stream_format or "", STREAM_TYPES["bytes"])
        async with aclosing(open_stream(response.stream_url)) as chunks:
            try:
                first = await anext(chunks, b"")
            except ConnectionLost as error:
                return replies.refusal(WorkerLost(f"the stream broke before its first byte: {error}"))
            return await pass_on(request, first, chunks, headers={**replies.HEADERS, "Content-Type": kind})

    async def _stream(self, request: web.BaseRequest, trusted: bool, _: str) -> web.StreamResponse:
        reply = await self._service.tracker.stream_proxy.serve(request, replies.HEADERS)
        if reply.status == 502:
            raise replies.NoSuchPath("the stream cannot be read: it was read before, has expired, or broke")
        return reply

    async def _proxy(self, request: web.BaseRequest, trusted: bool, _: str) -> web.StreamResponse:
        """The answer of a service elsewhere to a request that we have passed on."""
        data = await self._json_body(request, trusted)
        key = request.query.get("key", "")
        ack = self._service.tracker.handle_external(data, _peer_address(request), key)
        return replies.answer(request, ack, last=self._leaving)

    async def _health(self, request: web.BaseRequest, trusted: bool, _: str) -> web.StreamResponse:
        return web.Response(body=b"ok\n", headers=replies.TEXT)

    async def _ready(self, request: web.BaseRequest, trusted: bool, _: str) -> web.StreamResponse:
        reason = self._service.unready()
        if reason is None:
            return web.Response(body=b"ready\n", headers=replies.TEXT)
        return web.Response(status=503, body=f"{reason}\n".encode(), headers=replies.TEXT)

    async def _openapi(self, request: web.BaseRequest, trusted: bool, _: str) -> web.StreamResponse:
        registry = self._service.registry
        if self._document is None or self._document[0] is not registry:
            text = msgspec.json.encode(describe(registry.schemas(), token=self._token is not None))
            self._document = registry, text
        return web.Response(body=self._document[1], headers=replies.JSON)

    # -- bodies -------------------------------------------------------------------------------------

    async def _json_body(
        self, request: web.BaseRequest, trusted: bool, *, may_be_empty: bool = False
    ) -> bytes:
        """The body, which must say that it is JSON: a page can send anything else without asking first.
        Raises BadRequest, TooLarge, Busy.
        """
        kind = request.headers.get("Content-Type")
        if kind is None and may_be_empty and not request.body_exists:
            return b""
        if (
            kind != "application/json"
            and (kind or "").partition(";")[0].strip().lower() != "application/json"
        ):
            raise BadRequest(f"Content-Type must be application/json, not {printable(kind or 'missing')}")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadRequest("a compressed body is not taken: leave Content-Encoding out")
        content = request.content
        if content.is_eof():
            data: bytes = content.read_nowait()
            self._check_size(len(data))
            return data
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await self._slow_body(request, trusted)

    async def _slow_body(self, request: web.BaseRequest, trusted: bool) -> bytes:
        """A body that is not there yet."""
        body = bytearray()
        reserved = 0
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                wanted = request.content_length or 0
                while True:
                    wanted = max(wanted, len(body))
                    self._check_size(wanted)
                    self._reserve(wanted - reserved, trusted)
                    reserved = wanted
                    chunk = await request.content.readany()
                    if not chunk:
                        return bytes(body)
                    body += chunk
        except TimeoutError:
            raise BadRequest(f"the body did not come within {READ_TIMEOUT:g} seconds") from None
        except web.RequestPayloadError as error:
            raise BadRequest(f"the body is broken: {printable(error)}") from None
        finally:
            self._reading[trusted] -= reserved

    def _reserve(self, size: int, trusted: bool) -> None:
        """Count bytes of a body that is on its way in. Senders without the token have a budget of their own,
        and only get into each other's way. Small bodies that come in one piece do not count.
        """
        if size > 0 and self._reading[trusted] + size > self._service.config.unread_bytes:
            raise Busy("too many large requests are on their way in", retry_after=replies.RETRY_AFTER)
        self._reading[trusted] += size

    def _check_size(self, size: int) -> None:
        limit = self._service.config.max_frame
        if size > limit:
            raise TooLarge(f"the body has {size} bytes or more, the limit is {limit}")


def _needs_token(address: Address) -> ConfigError:
    return ConfigError(
        f"--http-no-token is for loopback addresses alone, not for {printable(address.host)}: others could "
        "run tasks here"
    )


def _options(request: web.BaseRequest) -> dict[str, Any]:
    """`?timeout=SECONDS&priority=N`."""
    options: dict[str, Any] = {}
    if "?" not in request.raw_path:
        return options
    query = urlsplit(request.raw_path).query
    for name, text in parse_qsl(query, keep_blank_values=True):
        kind = {"timeout": float, "priority": int}.get(name)
        if kind is None:
            raise BadRequest(f"unknown option {printable(name)}; known: priority, timeout")
        if name in options:
            raise BadRequest(f"the option {name} is given twice")
        try:
            options[name] = msgspec.convert(text, kind, strict=False)
        except msgspec.ValidationError:
            raise BadRequest(f"{name} must be a number, not {printable(text)}") from None
    return options


def _local_address(request: web.BaseRequest) -> str:
    transport = request.transport
    return _host_of(transport.get_extra_info("sockname") if transport is not None else None)


def _peer_address(request: web.BaseRequest) -> str:
    transport = request.transport
    return _host_of(transport.get_extra_info("peername") if transport is not None else None)


def _host_of(address: Any) -> str:
    """The IP of a socket's address, without a zone. Raises ConnectionResetError when it has none any more."""
    if not address:
        raise ConnectionResetError("the client has left")
    return str(address[0]).partition("%")[0]
