"""What the processes around the supervisor share: commands on stdin, what they send, when they send it again.

A peer is started with its name, its seed, the supervisor's socket, a folder for its sockets and its history,
and the hooks of others. It prints `ready`, takes commands, a JSON object a line, and ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from chaoslib.history import Log, outcome
from chaoslib.work import TASKS, WEIGHTS

Command = dict[str, Any]

_TICK = 0.02
ACK_TIMEOUT = 30.0
"""Seconds that a sender waits for an acknowledgement before it sends again."""

_PAUSES = (0.05, 0.8)
"""Seconds between two tries, at least and at most."""

_AWAY = 0.3
"""Seconds without new requests after one that nobody has acknowledged: what is due then comes later, so that
a restart costs time and no work.
"""

_SHARE_OF_OTHERS = 0.05
"""Of the requests, those whose answers go to the troubled hooks."""


class Given(NamedTuple):
    """What a peer is started with."""

    name: str
    seed: int
    socket: str
    folder: str
    rate: float
    hooks: tuple[str, ...] = ()

    def log(self) -> Log:
        return Log(Path(self.folder, f"{self.name}.log"))

    def random(self) -> random.Random:
        return random.Random(f"{self.seed} {self.name}")

    def command(self) -> list[str]:
        return [json.dumps(self._asdict())]

    @classmethod
    def read(cls, text: str) -> Given:
        found = cls(**json.loads(text))
        return found._replace(hooks=tuple(found.hooks))


class Ask(NamedTuple):
    """A request to be sent. `hook` is None for the sender's own."""

    id: str
    task: str
    number: int
    hook: str | None


class Refused(Exception):
    """The acknowledgement carries an error; its code is the argument."""


class NoAck(Exception):
    """There was no acknowledgement: it may have been taken, or not."""


Exchange = Callable[[Ask], Awaitable[None]]
"""Sends a request and waits for its acknowledgement. Raises Refused, NoAck."""


class Sender:
    """Sends requests of random tasks at a steady rate, as long as not too many are under way, and sends again
    what was not acknowledged, under the same id.
    """

    def __init__(self, given: Given, log: Log, exchange: Exchange, *, way: str, window: int) -> None:
        self._given = given
        self._log = log
        self._exchange = exchange
        self._way = way
        self._window = window
        self._chances = given.random()
        self._number = 0
        self._settling = False
        self._sending: set[asyncio.Task[None]] = set()
        self._waiting: set[str] = set()  # for the answer at our own hook
        self._away_until = 0.0

    def answered(self, id: str) -> None:
        self._waiting.discard(id)

    def settle(self) -> None:
        """Send nothing new any more."""
        self._settling = True

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        due, then = 0.0, loop.time()
        while not self._settling:
            await asyncio.sleep(_TICK)
            now = loop.time()
            due = min(due + self._given.rate * (now - then), self._window)
            then = now
            if now < self._away_until:
                continue
            room = self._window - len(self._sending) - len(self._waiting)
            for _ in range(min(int(due), room)):
                due -= 1
                self._start(self._next())

    def _next(self) -> Ask:
        self._number += 1
        (task,) = self._chances.choices(TASKS, tuple(WEIGHTS.values()))
        others = self._given.hooks
        hook = self._chances.choice(others) if others and self._chances.random() < _SHARE_OF_OTHERS else None
        return Ask(f"{self._given.name}-{self._number}", task, self._number, hook)

    def _start(self, ask: Ask) -> None:
        sending = asyncio.get_running_loop().create_task(self._send(ask))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def _send(self, ask: Ask) -> None:
        if ask.hook is None:
            self._waiting.add(ask.id)
        self._log.note("sent", ask.id, ask.task, ask.number, self._way)
        while True:
            try:
                await self._exchange(ask)
            except Refused as refusal:
                code = str(refusal)
                self._log.note("refused", ask.id, code)
                if code not in ("busy", "shutting_down", "error", "-"):
                    self._waiting.discard(ask.id)
                    return
            except NoAck:
                self._away_until = asyncio.get_running_loop().time() + _AWAY
            else:
                if self._way != "raw":
                    self._log.note("acked", ask.id)
                else:
                    self._waiting.discard(ask.id)  # it may never be answered
                return
            await asyncio.sleep(self._chances.uniform(*_PAUSES))
            self._log.note("again", ask.id)


async def commands(do: Callable[[Command], None]) -> None:
    """Say that we are ready, and do what we are told until the end of the input."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("ready", flush=True)
    while line := await reader.readline():
        do(json.loads(line))


# -- the wire, on plain streams -----------------------------------------------------------------------


def frame(message: dict[str, Any]) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return struct.pack(">I", len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Raises EOFError, OSError."""
    (size,) = struct.unpack(">I", await reader.readexactly(4))
    message: dict[str, Any] = json.loads(await reader.readexactly(size))
    return message


def url_object(url: str) -> dict[str, Any]:
    """A URL as Go writes it."""
    scheme, _, rest = url.partition("://")
    host, path = ("", rest) if scheme == "unix" else rest.split("/", 1)
    return {
        "Scheme": scheme,
        "Opaque": "",
        "User": None,
        "Host": host,
        "Path": path if scheme == "unix" else f"/{path}",
        "RawPath": "",
        "RawQuery": "",
        "Fragment": "",
    }


def acknowledgement(message: dict[str, Any], error: str = "") -> dict[str, Any]:
    """What the original says to a response."""
    stream = "stream_url" if "stream_url" in message else "streamURL"
    return {"error": error, "id": "", "result": None, stream: None}


class PlainHook:
    """A hook as the original has it, one message a connection: `decide(message)` gives the error of the
    acknowledgement, or None to close without one.
    """

    def __init__(self, path: str, decide: Callable[[dict[str, Any]], Awaitable[str | None]]) -> None:
        self.path = path
        self._decide = decide
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path, backlog=1024)

    async def close(self) -> None:
        """As if the program had ended: whoever connects finds nobody."""
        if self._server is not None:
            self._server.close()
            self._server = None
            for writer in self._connections:
                writer.close()
            os.unlink(self.path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            first = await reader.readexactly(1)
            if first == b"{":  # generation 1
                await self._decide(json.loads(first + await reader.read()))
                return
            (size,) = struct.unpack(">I", first + await reader.readexactly(3))
            message = json.loads(await reader.readexactly(size))
            error = await self._decide(message)
            if error is not None:
                writer.write(frame(acknowledgement(message, error)))
                await writer.drain()
        except (EOFError, OSError):
            pass  # the sender was killed, or we have been told to be gone
        finally:
            self._connections.discard(writer)
            writer.close()


def taken(log: Log, sender: Sender | None = None) -> Callable[[dict[str, Any]], Awaitable[str | None]]:
    """What a hook decides that takes all answers."""

    async def decide(message: dict[str, Any]) -> str | None:
        log.note("posted", message["id"], outcome(message), 1)
        if sender is not None:
            sender.answered(message["id"])
        return ""

    return decide
