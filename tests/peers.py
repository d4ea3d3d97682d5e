"""Peers for tests, on plain sockets and threads: nothing of acomm is in them."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WAIT = 20.0
"""Seconds after which a test that waits for an event has failed; nothing normally takes that long."""


SOCKET_BUFFER = 200 * 1024
"""Bytes that a unix socket's buffer holds, about: no single `recv` gives more."""


def frame(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise EOFError(f"{len(data)} of {size} bytes")
        data += chunk
    return data


def read_frame(sock: socket.socket) -> bytes:
    return read_exactly(sock, struct.unpack(">I", read_exactly(sock, 4))[0])


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data


def ack(id: str = "", error: str = "", key: str = "streamURL", **extra: Any) -> bytes:
    return json.dumps(
        {"error": error, "id": id, "result": None, key: None, **extra}, separators=(",", ":")
    ).encode()


@contextmanager
def connected(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT)
        sock.connect(path)
        yield sock


class Peer:
    """Serves a unix socket from a thread: each connection is handed to `serve(conn)`, in a thread of its
    own, and closed after it. What `serve` raises is an error of the test unless the peer is expected to
    be cut off.
    """

    def __init__(
        self, path: Path | str, serve: Callable[[socket.socket], None], *, backlog: int = 4096
    ) -> None:
        self.path = str(path)
        self.url = f"unix://{path}"
        self.connections = 0
        self.changed = threading.Condition()
        self.open: set[socket.socket] = set()
        self._serve = serve
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen(backlog)
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._socket.accept()
            except OSError:
                return
            conn.settimeout(WAIT)
            with self.changed:
                self.connections += 1
                self.open.add(conn)
                self.changed.notify_all()
            thread = threading.Thread(target=self._run, args=(conn,))
            self._threads.append(thread)
            thread.start()

    def _run(self, conn: socket.socket) -> None:
        try:
            self._serve(conn)
        except (EOFError, OSError):
            pass  # cut off, by the test or by us
        finally:
            with self.changed:
                self.open.discard(conn)
                self.changed.notify_all()
            conn.close()

    def cut(self) -> None:
        """Break all connections."""
        with self.changed:
            for conn in self.open:
                conn.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Serve no more, as if the process had ended; the socket's file is removed."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._accepting.join(WAIT)
        self.cut()
        for thread in self._threads:
            thread.join(WAIT)
        Path(self.path).unlink()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """As `__exit__`, for peers that need our event loop to come to their end."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GoPeer(Peer):
    """As the Go original: one `recv` for the header, one acknowledgement, close. Generation 2 reads the body
    with one `recv`, too; generation 3 until it is whole. A body that it cannot read has no acknowledgement.
    `messages` are what was received, `unreadable` the sizes of the bodies that were not.

    What none of its generations survives or ever reads is a fault of the test: a bare null, a header in
    pieces, a second message on the connection.
    """

    def __init__(
        self,
        path: Path | str,
        reply: Callable[[dict[str, Any]], bytes] | None = None,
        *,
        generation: int = 3,
        backlog: int = 4096,
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.unreadable: list[int] = []
        self.faults: list[str] = []
        self.generation = generation
        self.reply = reply or (lambda message: ack(message.get("id", "")))
        super().__init__(path, self._one, backlog=backlog)

    def _one(self, conn: socket.socket) -> None:
        header = conn.recv(4)
        if not header:
            return
        if len(header) < 4:
            self.faults.append(f"a header in pieces, of which the first is {header!r}")
            return
        (length,) = struct.unpack(">I", header)
        if self.generation == 2:
            body = conn.recv(min(length, SOCKET_BUFFER))
            body += bytes(length - len(body))
        else:
            body = read_exactly(conn, length)
        if body.strip() == b"null":
            self.faults.append("a null, which kills a Go program")
            return
        try:
            message = json.loads(body)
        except ValueError:
            self.unreadable.append(length)
            return
        self.messages.append(message)
        if answer := self.reply(message):
            conn.sendall(frame(answer))
            conn.shutdown(socket.SHUT_WR)
            # A test may have it grant a channel and close it nevertheless.
            if b'"acomm":1' not in answer and (more := conn.recv(100)):
                self.faults.append(f"more than one message on a connection: {more!r}")

    def close(self) -> None:
        super().close()
        if self.faults:
            raise AssertionError("; ".join(self.faults))


class GrantingPeer(Peer):
    """One of ours: acknowledges with `"acomm": 1` and takes any number of frames on a connection.

    `decide(message)` gives the acknowledgement, or None to break the connection without one.
    """

    def __init__(
        self, path: Path | str, decide: Callable[[dict[str, Any]], bytes | None] | None = None
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.decide = decide or (lambda message: ack(message.get("id", ""), acomm=1))
        self._lock = threading.Lock()
        super().__init__(path, self._many)

    def _many(self, conn: socket.socket) -> None:
        while True:
            message = json.loads(read_frame(conn))
            with self._lock:
                self.messages.append(message)
                answer = self.decide(message)
            if answer is None:
                return
            conn.sendall(frame(answer))


def url_object(path: str) -> dict[str, Any]:
    return {"Scheme": "unix", "Opaque": "", "User": None, "Host": "", "Path": path, "RawQuery": ""}


def answering(
    tmp_path: Path,
    answer: Callable[[dict[str, Any]], dict[str, Any]],
    refuse: Callable[[dict[str, Any]], str] = lambda message: "",
) -> GoPeer:
    """A coordinator of the original: acknowledges, and answers at the hook, on a connection of its own."""

    def reply(message: dict[str, Any]) -> bytes:
        error = refuse(message)
        if not error:
            threading.Thread(target=respond, args=(message,)).start()
        return ack(message["id"], error)

    def respond(message: dict[str, Any]) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(message["responseHook"]["Path"])
            sock.sendall(frame(json.dumps(answer(message)).encode()))
            assert json.loads(read_frame(sock))["error"] == ""

    return GoPeer(tmp_path / "peer.sock", reply)
