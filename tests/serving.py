"""A supervisor as a process of its own, and the peers that tests put around it."""

from __future__ import annotations

import json
import os
import queue
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from peers import WAIT, Peer, ack, connected, frame, read_all, read_frame

HERE = Path(__file__).parent
PROJECT = HERE.parent


def environment(folder: Path, **more: str) -> dict[str, str]:
    """An environment in which nothing of the user's, or of another test, is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACOMM_")}
    return {**kept, "XDG_RUNTIME_DIR": str(folder), "PYTHONPATH": f"{HERE}{os.pathsep}{PROJECT}", **more}


def serve_command(path: Path, *arguments: str) -> list[str]:
    """A supervisor of `servedtasks` with one worker, at `path`."""
    return [sys.executable, "-m", "workers", "servedtasks", "-w", "1", "--socket", str(path), *arguments]


class Served:
    """`python -m workers servedtasks`, ready when it is made. Its stderr is kept in a file."""

    def __init__(self, folder: Path, *arguments: str, modules: tuple[str, ...] = ("servedtasks",)) -> None:
        self.folder = folder
        self.path = str(folder / "s.sock")
        self.url = f"unix://{self.path}"
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Its own, as one that is replaced has things to tell yet.
        notify = folder / f"notify-{os.urandom(4).hex()}"
        self.notify.bind(str(notify))
        self.notify.settimeout(WAIT)
        command = [sys.executable, "-m", "workers", *modules, "--socket", self.path, *arguments]
        if not {"-w", "--workers"} & set(arguments):
            command += ["--workers", "2"]
        with open(folder / "stderr", "ab") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment(folder, NOTIFY_SOCKET=str(notify)),
            )
        self.pid = self.process.pid
        self._await_ready()

    def _await_ready(self) -> None:
        with pidfd(self.pid) as end:
            readable, _, _ = select.select([self.notify, end], [], [], WAIT)
        if self.notify not in readable:
            self.close()
            raise AssertionError(f"the supervisor did not start:\n{self.stderr()}")
        assert self.notified() == "READY=1"

    def notified(self) -> str:
        """The next notification to the service manager."""
        return self.notify.recv(4096).decode()

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(WAIT)

    def ask(self, message: bytes) -> bytes:
        """Send one frame on a connection of its own; the acknowledgement's bytes."""
        with connected(self.path) as sock:
            sock.sendall(frame(message))
            return read_frame(sock)

    def verb(self, task: str, args: Any = None) -> Any:
        """The result of a control verb, got by plain sockets."""
        with Hook(self.folder / f"verb-{os.urandom(4).hex()}") as hook:
            request = {"id": os.urandom(8).hex(), "task": task, "responseHook": hook.url, "args": args}
            assert json.loads(self.ask(json.dumps(request).encode()))["error"] == ""
            answer = hook.answer()
        assert answer["error"] == ""
        return answer["result"]

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.verb("acomm.stats")
        return stats

    def until(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Wait for the supervisor's figures to fulfil a condition; each look is an exchange with it."""
        timer = threading.Event()
        for _ in range(int(WAIT / 0.01)):
            stats = self.stats()
            if condition(stats):
                return stats
            timer.wait(0.01)
        raise AssertionError(f"in vain: {stats}\n{self.stderr()}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT)
        self.notify.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Hook(Peer):
    """A response hook that reads as the Go original does, one `recv` for the header and one for the body,
    acknowledges and closes. It keeps the bytes of each connection. `raw`: generation 1, which reads to
    the end and acknowledges nothing.
    """

    def __init__(
        self, path: Path | str, *, raw: bool = False, reply: Callable[[bytes], bytes | None] | None = None
    ) -> None:
        self.received: queue.Queue[bytes] = queue.Queue()
        self._reply = reply or (
            lambda body: ack(key="stream_url" if b'"stream_url"' in body else "streamURL")
        )
        super().__init__(path, self._raw if raw else self._frame)

    def _raw(self, conn: socket.socket) -> None:
        self.received.put(read_all(conn))

    def _frame(self, conn: socket.socket) -> None:
        header = conn.recv(4)
        body = conn.recv(int.from_bytes(header, "big"))
        answer = self._reply(body)
        if answer is not None:
            conn.sendall(frame(answer))
        self.received.put(header + body)

    def next(self) -> bytes:
        """The bytes of the next message, as they came."""
        return self.received.get(timeout=WAIT)

    def answer(self) -> dict[str, Any]:
        """The next framed message, decoded."""
        message = self.next()
        assert int.from_bytes(message[:4], "big") == len(message) - 4
        answer: dict[str, Any] = json.loads(message[4:])
        return answer


def request(id: str, task: str, hook: str | None = None, args: Any = None, **more: Any) -> bytes:
    """A generation 3 request as JSON."""
    message = {"id": id, "task": task, "taskURL": None, "responseHook": hook, "streamURL": None, "args": args}
    return json.dumps({**message, **more}).encode()


class Fifo:
    """A named pipe: `read` waits for what a task tells, `open` lets a task go that waits for it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        # Open for both, so that neither end is ever left waiting in open(), nor sees an end of file.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def read(self) -> str:
        """What a task has told. Fails after WAIT seconds."""
        assert select.select([self._fd], [], [], WAIT)[0], "nobody has told anything"
        return os.read(self._fd, 4096).decode()

    def drain(self) -> None:
        """Forget what tasks have told."""
        with suppress(BlockingIOError):
            while True:
                os.read(self._fd, 4096)

    def close(self) -> None:
        """Let a task go that waits for it. One that has not opened it yet finds an empty file: the pipe would
        have it wait for ever.
        """
        if self._fd >= 0:
            with suppress(FileNotFoundError):  # its folder has gone
                Path(f"{self.path}.empty").touch()
                os.replace(f"{self.path}.empty", self.path)
            os.close(self._fd)
            self._fd = -1


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


class Family:
    """The descendants of a process, found while it lives, to wait for their end when it is dead. Those
    `besides` are not of interest.
    """

    def __init__(self, pid: int, besides: Collection[int] = ()) -> None:
        self.fds: dict[int, int] = {}
        for process in psutil.Process(pid).children(recursive=True):
            if process.pid not in besides:
                with suppress(ProcessLookupError):
                    self.fds[process.pid] = os.pidfd_open(process.pid)

    def survivors(self, seconds: float) -> list[int]:
        """The pids that have not ended within so many seconds."""
        poller = select.poll()
        alive = {fd: pid for pid, fd in self.fds.items()}
        for fd in alive:
            poller.register(fd, select.POLLIN)
        end = time.monotonic() + seconds
        while alive and (ended := poller.poll(max(end - time.monotonic(), 0) * 1000)):
            for fd, _ in ended:
                poller.unregister(fd)
                del alive[fd]
        return list(alive.values())

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
