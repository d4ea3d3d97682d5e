"""What is fuzzed. A target raises what must not happen: an unexpected exception, or an AssertionError."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import tempfile
from typing import Any, Protocol

import msgspec

from acomm import messages
from acomm.channel import _ack_error
from acomm.errors import AcommError, WorkerLost
from acomm.framing import Framer, FrameTooLarge, frame
from acomm.messages import Request, Response, ok_ack, salvage
from acomm.tracker import Tracker
from workers.callers import Callers
from workers.calls import Answer, Call, Failure
from workers.config import Config
from workers.door import Door
from workers.pool import Pool
from workers.registry import Registry, task
from workers.scoreboard import SLOT_SIZE, Scoreboard

_MAX_FRAME = 4096


class Target(Protocol):
    def samples(self) -> list[bytes]: ...
    def feed(self, data: bytes, dice: random.Random) -> None: ...


def _requests() -> list[bytes]:
    plain = Request("echo", [1, "é", {"id": "x"}], id="abc", response_hook="unix:///tmp/x.sock")
    more = Request(
        "add", {"a": 1}, id="ü", response_hook="http://h/x", timeout=2.5, priority=3, detached=True
    )
    return [r.encode(wire, extended=e) for r in (plain, more) for wire in (1, 2, 3) for e in (False, True)]


def _responses() -> list[bytes]:
    error = AcommError("x", type="ValueError", traceback="t", receipt={"pid": 1})
    answers = [Response("abc", {"a": 1}), Response("abc"), Response("é", error=error)]
    answers.append(Response("s", stream_url="unix:///tmp/s", stream_format="lines"))
    made = [r.encode(wire, extended=e) for r in answers for wire in (1, 2, 3) for e in (False, True)]
    return [*made, *(ok_ack(b'"abc"', wire, e) for wire in (2, 3) for e in (False, True))]


class Framing:
    """Bytes as they come, cut anywhere: the same messages as in one piece, and no more kept than came."""

    def samples(self) -> list[bytes]:
        framed = [frame(message) for message in _requests() + _responses()]
        return [*framed, framed[0] + framed[1] + frame(b""), *_requests()]

    def feed(self, data: bytes, dice: random.Random) -> None:
        whole = self._read([data])
        cut = dice.randrange(len(data) + 1)
        assert self._read([data[:cut], data[cut:]]) == whole
        at = sorted(dice.randrange(len(data) + 1) for _ in range(4))
        pieces = [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]
        assert self._read(pieces) == whole

    def _read(self, pieces: list[bytes]) -> tuple[list[bytes], str]:
        framer, found, came = Framer(_MAX_FRAME), list[bytes](), 0
        try:
            for piece in pieces:
                found += framer.receive(piece)
                came += len(piece)
                assert framer.pending <= came
            found += framer.receive_eof()
        except FrameTooLarge as error:
            return found + error.messages, "too large"
        except AcommError as error:
            return found, str(error)
        return found, ""


class _Messages:
    decoded: Any

    def feed(self, data: bytes, dice: random.Random) -> None:
        quick = _reading(self.decoded, data)
        own = messages._decode_own_request, messages._decode_own_response
        messages._decode_own_request = lambda data, localhost=None: None
        messages._decode_own_response = lambda data: None
        try:
            general = _reading(self.decoded, data)
        finally:
            messages._decode_own_request, messages._decode_own_response = own
        assert quick == general, (quick, general)
        if not isinstance(quick, dict):
            salvage(data, raw=dice.random() < 0.2)
            _ack_error(data)
            return
        message = self.decoded.decode(data)
        for wire in (1, 2, 3):
            if wire < 3 and isinstance(message, Request) and message.response_hook is None:
                continue
            again = self.decoded.decode(message.encode(wire, extended=True))
            assert (again.id, again.extended) == (message.id, True)
        again = _reading(self.decoded, message.encode(3, extended=True))
        same = (
            {**quick, "wire": 3, "extended": True}
            if isinstance(message, Request)
            else {**quick, "extended": True}
        )
        if quick.get("error") is None:
            assert again == same, (again, same)


class Requests(_Messages):
    """Requests of all generations: the quick way is the general one, and what is written is read again."""

    decoded = Request

    def samples(self) -> list[bytes]:
        return _requests()


class Responses(_Messages):
    """Responses and acknowledgements, likewise."""

    decoded = Response

    def samples(self) -> list[bytes]:
        return _responses()


def _reading(cls: Any, data: bytes) -> Any:
    try:
        message = cls.decode(data)
    except AcommError as error:
        return type(error).__name__
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    fields["error"] = None if fields.get("error") is None else fields["error"].info()
    found = {
        name: bytes(value) if isinstance(value, msgspec.Raw) else value for name, value in fields.items()
    }
    if found.get("args") == b"null":
        found["args"] = None  # the quick way leaves it as it is, and it means the same
    for name in ("response_hook", "task_url", "stream_url"):
        if found.get(name) is not None and not found[name].startswith("unix:"):
            scheme, colon, rest = found[name].partition("#")[0].partition(":")  # a fragment does not travel
            found[name] = scheme.lower() + colon + rest
    return found


class _Processes:
    """One worker, and no process."""

    starting = 0

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.killed = False

    def speaker(self, identity: bytes) -> Any:
        return self.worker

    def get(self, token: int) -> Any:
        return self.worker

    def worked(self, worker: Any, answers: int) -> None:
        worker.finished += answers

    def kill(self, worker: Any) -> bool:
        self.killed = True
        return True


class _Worker:
    token = 1
    ready = True
    finished = 0
    stopping = False


class Answers:
    """What a worker gone mad may send: the pool drops it or takes it, and each call ends once at most."""

    def __init__(self) -> None:
        self._pool = Pool(["fuzzing"], workers=1)
        self._now = 0.0

    def samples(self) -> list[bytes]:
        answers = [
            Answer(1, 0.001, b"1"),
            Answer(2, 0.5, None, Failure("task_error", "m", "ValueError", "t", True)),
            Answer(1, 0.1, None, None, "unix:///tmp/s"),
            *(Answer(1, 0.0, None, Failure(code, "")) for code in ("returned", "abandoned", "outgrown")),
        ]
        encode = msgspec.msgpack.encode
        return [encode(answers), *(encode([a, Answer(2, 0.1, b"null")]) for a in answers), encode([])]

    def feed(self, data: bytes, dice: random.Random) -> None:
        pool = Pool(["fuzzing"], workers=1) if dice.random() < 0.01 else self._pool
        self._pool = pool
        processes = _Processes(_Worker())
        pool._processes = processes  # type: ignore[assignment]
        pool.dispatcher = type(pool.dispatcher)()
        dispatcher = pool.dispatcher
        self._now += 1.0
        dispatcher.worker_ready(1, self._now)
        calls = [
            Call("a", b"[]", retries=1),
            Call("a", b"[]", timeout=5.0),
            Call("b", None, deadline=self._now + 9),
        ]
        for call in calls:
            dispatcher.submit(call)
        ended: list[Any] = []
        for _ in range(3):
            list(dispatcher.assign(self._now))
            pool._message(b"w", data, 0, self._now, ended)
            seconds = [dispatcher._predicted.get(task, 0.0) for task in "ab"]
            assert all(math.isfinite(s) for s in seconds), seconds
            self._now += 0.01
        if processes.killed:
            dispatcher.retire(1)
        lost = lambda call: WorkerLost("lost")  # noqa: E731
        ended += dispatcher.worker_lost(1, set(), lost)
        ended += dispatcher.abandon(WorkerLost("no worker"))
        ended += dispatcher.due(self._now + 100, lambda number: None)[0]  # type: ignore[arg-type,return-value]
        ends = [outcome.call.number for outcome in ended if outcome.stream is None]
        assert len(ends) == len(set(ends)), ends
        for outcome in ended:
            if outcome.error is not None:
                Response("x", error=outcome.error).encode(3, extended=True)


class Slots:
    """Garbage in the scoreboard: what is read of it can be told to others, and no time of it is none."""

    def __init__(self) -> None:
        self._board = Scoreboard.create(1, 2)

    def samples(self) -> list[bytes]:
        writer = self._board.writer(0)
        writer.begin(7, 12.5)
        writer.progress(1.0, 2.0, "note é")
        return [bytes(self._board._bytes[:SLOT_SIZE])]

    def feed(self, data: bytes, dice: random.Random) -> None:
        page = (data + bytes(2 * SLOT_SIZE))[: 2 * SLOT_SIZE]
        self._board._bytes[: 2 * SLOT_SIZE] = page
        for slot in [self._board.read(0), *self._board.running(0)]:
            assert all(math.isfinite(value) for value in (slot.started, slot.done, slot.total)), slot
            msgspec.json.encode(slot)


@task
def echo(value: Any = None) -> Any:
    return value


class _Service:
    """Takes every request, and answers it at once."""

    draining = False

    def __init__(self, folder: str) -> None:
        settings = {"modules": ("fuzzing",), "http": "127.0.0.1:0", "http_no_token": True}
        self.config = Config.load({**settings, "socket": f"{folder}/s.sock", "max_frame": 65536}, environ={})
        self.registry = Registry([echo])
        self.tracker = Tracker()
        self.callers = Callers()

    def offer(self, request: Request, origin: Any, decided: Any, resolve: Any = None) -> None:
        decided(None)
        if resolve is not None:
            resolve(Response(request.id, request.args))

    def refused(self, error: AcommError) -> None: ...

    def caller_left(self, caller: object) -> None: ...

    def unready(self) -> None:
        return None


class Http:
    """Raw bytes at the HTTP door, a connection each: an answer or none, and no fault of ours in the log."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._folder = tempfile.TemporaryDirectory()
        self._service = _Service(self._folder.name)
        self._door = Door(self._service)
        self._faults: list[str] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self._faults.append(logging.Formatter().format(record))  # type: ignore[method-assign]
        for name in ("acomm.door", "asyncio", "aiohttp"):
            logging.getLogger(name).addHandler(handler)
        self._loop.run_until_complete(self._start())

    async def _start(self) -> None:
        await self._service.tracker.start()
        await self._door.start()
        self._port = int(self._door.url.rpartition(":")[2])

    def samples(self) -> list[bytes]:
        json = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        body = Request("echo", [1], id="a", response_hook="unix:///tmp/x").encode(extended=True)
        close = b"Host: localhost\r\nConnection: close\r\n"
        posts = [(b"/", body), (b"/call/echo?timeout=5", b"[1]"), (b"/proxy?key=1", b"{}")]
        gets = (b"/healthz", b"/readyz", b"/openapi.json", b"/stream?x=1")
        made = [b"POST %b HTTP/1.1\r\n%b%b" % (path, close, json % (len(data), data)) for path, data in posts]
        made += [b"GET %b HTTP/1.1\r\n%b\r\n" % (path, close) for path in gets]
        chunked = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1]\r\n0\r\n\r\n"
        return [*made, b"POST /call/echo HTTP/1.1\r\n" + close + chunked]

    def feed(self, data: bytes, dice: random.Random) -> None:
        answer = self._loop.run_until_complete(self._exchange(data))
        assert not answer or answer.startswith(b"HTTP/1."), answer[:100]
        faults, self._faults[:] = self._faults[:], []
        assert not faults, faults[0]

    async def _exchange(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(10):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()


TARGETS: dict[str, type[Any]] = {
    "framing": Framing,
    "requests": Requests,
    "responses": Responses,
    "answers": Answers,
    "slots": Slots,
    "http": Http,
}
