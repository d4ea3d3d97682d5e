"""Request and Response: what they hold, what is valid, and their three spellings on the wire.

The Go original has three generations:

=====  =====================================================================  ==================
gen.   request keys                                                           response keys
=====  =====================================================================  ==================
1      id task responsehook args                                              error id result
2      id task responsehook args                                              ... stream_url
3      id task taskURL responseHook streamURL args                            ... streamURL
=====  =====================================================================  ==================

They are always all there, in this order, compact. Receivers match keys in any case and ignore those
that they do not know. Two programs that both know this library may say more: a message that carries
`"acomm": 1` asks for extension keys, and only then does its answer carry any:

* request: `timeout` (seconds left when sent), `priority`, `handlers`, `detached` (true: its sender does not
  keep the connection until the answer comes)
* response: `stream_format`
* response and acknowledgement: `error_info`, and `"acomm": 1` itself
* acknowledgement of a request: `accepted`
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec

from acomm import handlers, jsontext, urls
from acomm.errors import AcommError, BadRequest, ConfigError, from_wire
from acomm.members import (
    GENERATION_3_KEYS,
    MAX_ID,
    MAX_TASK,
    REQUEST_KEYS,
    RESPONSE_KEYS,
    STRING,
    asks_for_more,
    check_name,
    folded,
    read_text,
    read_value,
)

T = TypeVar("T")
Handler = Callable[["Request", "Response"], Any]

MAX_PRIORITY = 2**31 - 1
"""Either way of zero; what a database column and every other language's integer hold."""

_SPARE = 16 * 1024  # bytes of a message besides its arguments that may be kept with them

GENERATIONS = (1, 2, 3)

RESERVED = "acomm."
"""Tasks whose names begin so are a supervisor's own verbs (`acomm.stats`)."""

_number = msgspec.json.Decoder(float | None)
_integer = msgspec.json.Decoder(int | None)
_flag = msgspec.json.Decoder(bool | None)
_anything = msgspec.json.Decoder()
_quote = msgspec.json.encode


class Handlers(msgspec.Struct, frozen=True, omit_defaults=True):
    """Pickled handlers of a request, run by the supervisor: base64 text, and what made them."""

    success: str | None = None
    error: str | None = None
    python: str = ""
    dill: str = ""

    @classmethod
    def pack(cls, on_success: Handler | None, on_error: Handler | None) -> Handlers | None:
        """Pickle handlers for the supervisor; None if there are none. Raises HandlerError."""
        if on_success is None and on_error is None:
            return None
        return cls(
            handlers.dump(on_success) if on_success else None,
            handlers.dump(on_error) if on_error else None,
            handlers.python_version(),
            handlers.dill_version(),
        )


_handlers = msgspec.json.Decoder(Handlers | None)


def new_id() -> str:
    """A random UUID, as `str(uuid.uuid4())` makes them in three times the time."""
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{_variants[text[16]]}{text[17:20]}-{text[20:]}"


_variants = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


class _Positional(msgspec.Struct, frozen=True):
    task: str
    args: Any = None


class Request(_Positional, frozen=True, kw_only=True):
    """A task to run: its name, its arguments, and where the response goes.

    `args` is any JSON value (or msgspec.Raw, JSON text as it is, which is what decoding gives).
    `timeout` is in seconds, from acceptance. `on_success(request, response)` and `on_error(request,
    response)` run in the process whose Tracker tracks the request and never travel; `handlers` are
    their pickled form, which the supervisor runs.

    `wire` is the generation that the request came in, `extended` whether its sender asked for
    extension keys; answers go back in kind. `detached`: the sender goes when it has the acknowledgement,
    which says nothing of who waits for the answer.
    """

    id: str = msgspec.field(default_factory=new_id)
    response_hook: str | None = None
    task_url: str | None = None
    stream_url: str | None = None
    timeout: float | None = None
    priority: int = 0
    on_success: Handler | None = None
    on_error: Handler | None = None
    handlers: Handlers | None = None
    wire: int = 3
    extended: bool = False
    detached: bool = False

    def validate(self) -> None:
        """Check the request as its receiver will. Raises BadRequest, which says what to mend."""
        check_name("id", self.id, MAX_ID)
        check_name("task", self.task, MAX_TASK)
        for what, url in (
            ("response hook", self.response_hook),
            ("task URL", self.task_url),
            ("stream URL", self.stream_url),
        ):
            if url is not None:
                urls.check(url, what)
        if self.response_hook is None and self.wire < 3 and self.handlers is None:
            raise BadRequest("missing response hook")
        _check_limits(self)

    @classmethod
    def decode(cls, data: bytes, *, raw: bool = False, localhost: str | None = None) -> Request:
        """Read a request of any generation; `args` stay undecoded. Raises BadRequest.

        `raw`: it came as EOF-ended JSON, which makes it generation 1 whatever its keys. `localhost` is the
        address of a sender over HTTP: hook and stream URL lead there where they name the sender's own host.
        """
        if not raw and (request := _decode_own_request(data, localhost)) is not None:
            return request
        fields = jsontext.object_fields(data, REQUEST_KEYS, "request")
        wire = 1 if raw else 2 if GENERATION_3_KEYS.isdisjoint(fields) else 3
        get = folded(fields, REQUEST_KEYS, "request").get
        args = get("args")
        if args is not None:
            jsontext.check_value(args, "args")
            if len(data) > len(memoryview(args)) + _SPARE:
                args = args.copy()  # it would keep all of the message, which nobody counts
        request = cls(
            read_text(get("task"), "task"),
            args,
            id=read_text(get("id"), "id"),
            response_hook=urls.decode(get("responsehook"), "response hook", localhost),
            task_url=urls.decode(get("taskurl"), "task URL") if wire == 3 else None,
            stream_url=urls.decode(get("streamurl"), "stream URL", localhost) if wire == 3 else None,
            timeout=read_value(_number, get("timeout"), "timeout"),
            priority=read_value(_integer, get("priority"), "priority") or 0,
            handlers=read_value(_handlers, get("handlers"), "handlers"),
            wire=wire,
            extended=asks_for_more(get("acomm")),
            detached=read_value(_flag, get("detached"), "detached") or False,
        )
        check_name("id", request.id, MAX_ID)
        check_name("task", request.task, MAX_TASK)
        _check_limits(request)
        if request.response_hook is None and wire < 3 and request.handlers is None:
            raise BadRequest("missing response hook")
        return request

    def encode(self, wire: int = 3, *, extended: bool = False) -> bytes:
        """The request in generation `wire`, with `"acomm": 1` if `extended`.

        Raises TypeError for arguments that JSON cannot express.
        """
        _check_generation(wire)
        hook = urls.encode(self.response_hook)
        args = b"null" if self.args is None else jsontext.encode(self.args, "args")
        head = b'{"id":%b,"task":%b,' % (_quote(self.id), _quote(self.task))
        if wire < 3:
            body = b'"responsehook":%b,"args":%b' % (hook, args)
        else:
            body = b'"taskURL":%b,"responseHook":%b,"streamURL":%b,"args":%b' % (
                urls.encode(self.task_url),
                hook,
                urls.encode(self.stream_url),
                args,
            )
        return head + body + self._extensions(extended) + b"}"

    def _extensions(self, extended: bool) -> bytes:
        extra = b""
        if self.timeout is not None:
            extra += b',"timeout":%b' % _quote(self.timeout)
        if self.priority:
            extra += b',"priority":%d' % self.priority
        if self.handlers is not None:
            extra += b',"handlers":%b' % _quote(self.handlers)
        if not extended:
            return extra
        return extra + (b',"detached":true,"acomm":1' if self.detached else b',"acomm":1')

    def args_as(self, type: type[T]) -> T:
        """The arguments as `type`. Raises BadRequest when they do not fit."""
        return _as(self.args, type, "args")

    async def respond(self, response: Response) -> None:
        """Send `response` to this request's hook, in the generation that the request came in.

        Returns when it is acknowledged. Raises what `acomm.send` raises.
        """
        if self.response_hook is None:
            raise BadRequest("the request has no response hook")
        if _transport is None:
            raise ConfigError("no transport: import acomm, not acomm.messages alone")
        await _transport(self.response_hook, response, self.wire)

    async def handle_response(self, response: Response) -> None:
        """Run the handler that fits: `on_error` if the response carries an error, else `on_success`.

        A plain function runs in a thread, so it may block; a coroutine function on the event loop.
        """
        handler = self.on_success if response.error is None else self.on_error
        if handler is not None:
            await handlers.run(handler, self, response)


class Response(msgspec.Struct, frozen=True):
    """The answer to a request, and the form of every acknowledgement.

    `result` is any JSON value (msgspec.Raw when decoded), `error` None or an AcommError. The two
    exclude each other. `stream_format` says what the stream at `stream_url` is made of, where that is
    known: "lines", each the JSON of an item, or "bytes".
    """

    id: str
    result: Any = None
    error: AcommError | None = None
    stream_url: str | None = None
    extended: bool = False
    stream_format: str | None = None

    def __post_init__(self) -> None:
        if self.error is not None and self.result is not None:
            raise ValueError("a response carries a result or an error, not both")
        if self.error is not None and not isinstance(self.error, AcommError):
            raise TypeError(f"error must be an AcommError, not {type(self.error).__name__}")

    @classmethod
    def to(
        cls,
        request: Request,
        result: Any = None,
        error: AcommError | str | None = None,
        stream_url: str | None = None,
        stream_format: str | None = None,
    ) -> Response:
        """The response to `request`; an error may be given as its text."""
        if isinstance(error, str):
            error = AcommError(error) if error else None
        return cls(request.id, result, error, stream_url, request.extended, stream_format)

    @classmethod
    def decode(cls, data: bytes) -> Response:
        """Read a response or acknowledgement of any generation. Raises BadRequest."""
        if (response := _decode_own_response(data)) is not None:
            return response
        fields = jsontext.object_fields(data, RESPONSE_KEYS, "response")
        get = folded(fields, RESPONSE_KEYS, "response").get
        text = read_text(get("error"), "error")
        error = None
        if text:
            info = get("error_info")
            details = None if info is None else jsontext.parse_as(_anything, info, "error_info")
            error = from_wire(text, details if isinstance(details, dict) else None)
        result = get("result")
        if result is not None:
            jsontext.check_value(result, "result")
            if bytes(result) == b"null":
                result = None
        # Who does not know our generation sends both keys, one of them null.
        stream = urls.decode(get("streamurl"), "stream URL") or urls.decode(get("stream_url"), "stream URL")
        stream_format = read_value(STRING, get("stream_format"), "stream_format")
        response = cls(
            read_text(get("id"), "id"), None, error, stream, asks_for_more(get("acomm")), stream_format
        )
        # A peer may send both; like the original we then handle the error and keep the result.
        msgspec.structs.force_setattr(response, "result", result)
        return response

    def encode(self, wire: int = 3, *, extended: bool = False) -> bytes:
        """The response in generation `wire`; `extended` adds the extension keys and `"acomm": 1`."""
        _check_generation(wire)
        result = b"null" if self.result is None else jsontext.encode(self.result, "result")
        body = b'{"error":%b,"id":%b,"result":%b' % (_error_text(self.error), _quote(self.id), result)
        if wire == 2:
            body += b',"stream_url":%b' % urls.encode(self.stream_url)
        elif wire == 3:
            body += b',"streamURL":%b' % urls.encode(self.stream_url)
        if not extended:
            return body + b"}"
        if self.error is not None:
            body += b',"error_info":%b' % error_json(self.error)
        if self.stream_format is not None:
            body += b',"stream_format":%b' % _quote(self.stream_format)
        return body + b',"acomm":1}'

    def result_as(self, type: type[T]) -> T:
        """The result as `type`; raises the response's error if it carries one, BadRequest if it does
        not fit.
        """
        if self.error is not None:
            raise self.error
        return _as(self.result, type, "result")


# -- the spelling that `encode` writes, read in one go ------------------------------------------------
#
# Nearly all messages are ours. One typed decode takes them apart; whatever does not fit takes the way
# that understands all spellings and says what is wrong. As there, the lengths of the members prove that
# nothing is repeated: a repeat, white space, an escape or a non-ASCII character makes the message longer
# than they add up to, and nothing makes it shorter.

_ABSENT = msgspec.Raw(b"")


class _OwnRequest(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    id: str
    task: str
    taskURL: None
    responseHook: msgspec.Raw
    streamURL: None
    args: msgspec.Raw
    acomm: int
    timeout: msgspec.Raw = _ABSENT
    priority: msgspec.Raw = _ABSENT


class _OwnResponse(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    error: str
    id: str
    result: msgspec.Raw
    streamURL: None
    acomm: int


_own_request = msgspec.json.Decoder(_OwnRequest)
_own_response = msgspec.json.Decoder(_OwnResponse)
_OWN_REQUEST_SIZE = len(
    '{"id":"","task":"","taskURL":null,"responseHook":,"streamURL":null,"args":,"acomm":1}'
)
_OWN_RESPONSE_SIZE = len('{"error":"","id":"","result":,"streamURL":null,"acomm":1}')


def _decode_own_request(data: bytes, localhost: str | None = None) -> Request | None:
    try:
        own = _own_request.decode(data)
        data.decode()
    except jsontext.INVALID:
        return None
    hook, args = own.responseHook, own.args
    size = _OWN_REQUEST_SIZE + len(own.id) + len(own.task) + len(memoryview(hook)) + len(memoryview(args))
    timeout, priority = None, 0
    if own.timeout is not _ABSENT:
        size += len(',"timeout":') + len(memoryview(own.timeout))
        timeout = read_value(_number, own.timeout, "timeout")
    if own.priority is not _ABSENT:
        size += len(',"priority":') + len(memoryview(own.priority))
        priority = read_value(_integer, own.priority, "priority") or 0
    if size != len(data) or own.acomm != 1:
        return None
    jsontext.check_value(args, "args")
    request = Request(
        own.task,
        args,
        id=own.id,
        response_hook=urls.decode(hook, "response hook", localhost),
        timeout=timeout,
        priority=priority,
        extended=True,
    )
    check_name("id", own.id, MAX_ID)
    check_name("task", own.task, MAX_TASK)
    if timeout is not None or priority:
        _check_limits(request)
    return request


def _decode_own_response(data: bytes) -> Response | None:
    try:
        own = _own_response.decode(data)
        data.decode()
    except jsontext.INVALID:
        return None
    result = own.result
    size = len(memoryview(result))
    if own.error or own.acomm != 1 or _OWN_RESPONSE_SIZE + len(own.id) + size != len(data):
        return None
    jsontext.check_value(result, "result")
    return Response(own.id, None if size == 4 and bytes(result) == b"null" else result, extended=True)


class Transport(Protocol):
    """Sends a payload to a URL in a generation, returns when it is acknowledged."""

    def __call__(self, url: str, payload: Response, wire: int) -> Awaitable[None]: ...


# Messages lie below everything that does I/O, so what `respond` sends through is put in from above.
_transport: Transport | None = None


def set_transport(transport: Transport) -> None:
    global _transport
    _transport = transport


def error_json(error: AcommError) -> bytes:
    """The `error_info` object of `error` as JSON."""
    return jsontext.encode_anyhow(error.info())


def encode_payload(payload: Any, wire: int, *, extended: bool = False) -> bytes:
    """The bytes of a message: Request and Response in generation `wire`, bytes as they are, any other
    value as JSON. Raises TypeError, and ValueError for what is `null` as JSON: it kills a Go peer.
    """
    if isinstance(payload, Request | Response):
        return payload.encode(wire, extended=extended)
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload)
    data = jsontext.encode(payload, "payload")
    if data.strip() == b"null":
        raise ValueError("a message cannot be null: it would kill a Go peer")
    return data


def _check_limits(request: Request) -> None:
    if request.timeout is not None and not 0 < request.timeout < math.inf:
        raise BadRequest(f"timeout must be a positive number of seconds, not {request.timeout}")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise BadRequest(f"priority must be within {MAX_PRIORITY} of zero, not {request.priority}")


def _check_generation(wire: int) -> None:
    if wire not in GENERATIONS:
        raise ValueError(f"wire must be 1, 2 or 3, not {wire!r}")


def _as(value: Any, type: type[T], what: str) -> T:
    raw = value if isinstance(value, msgspec.Raw) else jsontext.encode(value, what)
    return jsontext.parse_as(msgspec.json.Decoder(type), memoryview(raw), what)


def _error_text(error: AcommError | None) -> bytes:
    if error is None:
        return b'""'
    # An empty text means success to every peer, so an error always has some.
    return jsontext.encode_anyhow(str(error) or error.type or error.code)
