"""A fork server: one warm template process that forks workers in a few milliseconds.

      parent (supervisor)                template                          worker, one a fork
    +---------------------+        +---------------------+             +----------------------+
    | ForkServer          | fork   | preloaded modules,  |   fork()    | own process group    |
    |   fork() kill()     |------->| gc.freeze()         |------------>| target(config, fds)  |
    |   events()          |<-------| subreaper: reaps    |   SIGCHLD   |   subprocesses ...   |
    |                     | events |   and reports       |<------------|                      |
    | lifeline, write end |- - - - | - - - - - - - - - - | - - - - - ->| lifeline, read end   |
    +---------------------+  pipe  +---------------------+             +----------------------+

* The **parent** may have threads, an event loop and ZeroMQ contexts; it is never forked.
* The **template** imports the tasks once and does nothing else but fork, wait and kill. If its socket to
  the parent ends, it kills all descendants, removes the `cleanup` paths and exits.
* A **worker** holds a read end of the lifeline pipe, whose only write end is in the parent. When the
  parent dies in whatever way, the kernel itself sends SIGKILL to the worker's group, even while C code
  holds the GIL. Neither way needs the other.

Why not `multiprocessing.forkserver`: it imports the caller's `__main__` again, it does not freeze the
garbage collector's heap (workers then unshare it at their first collection), it does not tell what a
child used, there is one a process, and its children outlive a killed parent.

**Killing is done by the template**, never by the parent's own `killpg`: only the process that reaps knows
that a pid is still the worker's, so only there is no moment at which the number may belong to a stranger.
That costs a message, about 0.1 ms, or the rest of a fork in progress. The template also kills the group of
every worker that dies by itself, before it reaps the leader, and descendants that left the group.

A worker that is *ended* (`end`) is asked first where it is and to stop (`workers.ending`). What workers print
goes through the template, too (`workers.capture`).

If the template dies, nobody can tell how the workers fare. `Gone` is reported, and everything that
it started is killed: the groups by the lifeline, the rest by a mark in the environment. Start another one.

Limits: a descendant that left the group *and* emptied its environment outlives a template killed by
SIGKILL, and one that left the group outlives a template and a parent killed together. Threads that a
preloaded module starts do not exist in the workers.

`ForkServer` is not thread-safe: one thread, or one event loop, owns it.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from types import TracebackType

from workers import lineage, template
from workers.ending import Graces
from workers.tails import Said, unpack

__all__ = ["Event", "Exited", "Failed", "ForkFailed", "ForkServer", "Forked", "Gone", "Ready"]


@dataclass(frozen=True, slots=True)
class Ready:
    """The modules are loaded; forks take milliseconds from now on."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A preloaded module or the target could not be imported; `Gone` follows. `message` is one line."""

    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Forked:
    """The worker asked for with `token` runs as `pid`. Its first own message may arrive before this."""

    token: int
    pid: int


@dataclass(frozen=True, slots=True)
class ForkFailed:
    """No worker for `token`: the system is out of processes, memory or descriptors. Another try may work."""

    token: int
    message: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The worker is dead and reaped.

    `status` is the exit code, or minus the signal; `max_rss` its peak resident bytes (at least the
    template's); `cpu` user and system seconds. Both include subprocesses that it waited for. `said` is the
    last of what it printed, and faulthandler's words; `oom` whether it was likely the kernel's OOM killer.
    """

    token: int
    pid: int
    status: int
    max_rss: int
    cpu: float
    said: tuple[Said, ...] = ()
    oom: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """The template has died, and all workers with it; reported once, the last event.

    `pids` are the workers that were alive, and get no `Exited`.
    """

    pids: tuple[int, ...]


Event = Ready | Failed | Forked | ForkFailed | Exited | Gone


class ForkServer:
    """The parent's side: start a template, ask it for workers, read what happens to them.

    `preload` are modules to import; `target` is "module:function", called in each worker as
    `function(config, fds)`. Its return exits 0, an exception prints a traceback and exits 1, `sys.exit`
    does as usual. Functions that the worker itself registered with `atexit` run; threads are not joined.
    `paths` come before this process's `sys.path`; files and folders in `cleanup` are removed at the end.
    What workers print is passed on to our stdout and stderr by the template, which keeps the last of it for
    `Exited.said`; with `capture` False it goes there straight.
    """

    def __init__(
        self,
        preload: Sequence[str],
        *,
        paths: Sequence[str] = (),
        target: str,
        cleanup: Sequence[str] = (),
        capture: bool = True,
    ) -> None:
        self._preload = [str(name) for name in preload]
        self._paths = [os.fspath(path) for path in paths]
        self._target = target
        self._cleanup = [os.path.abspath(path) for path in cleanup]
        self._capture = capture
        self._server = uuid.uuid4().hex[:16]
        self._state = "new"
        self._live: dict[int, int] = {}  # pid -> token
        self._outbox: deque[tuple[bytes, list[int]]] = deque()

    def __repr__(self) -> str:
        return f"<ForkServer {self._state}, {len(self._live)} workers>"

    def __enter__(self) -> ForkServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The template's."""
        return self._process.pid

    def start(self) -> None:
        """Launch the template and return; `Ready` or `Failed` is reported later. Once an object."""
        if self._state != "new":
            raise RuntimeError(f"a fork server starts once; this one is {self._state}")
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read_end, write_end = os.pipe()
        self._lifeline = FileIO(write_end, "wb")
        self._poller = select.epoll()
        try:
            self._process = self._launch(theirs.fileno(), read_end)
        except BaseException:
            self._release()
            self._state = "closed"
            raise
        finally:
            theirs.close()
            os.close(read_end)
        self._sock.setblocking(False)
        self._poller.register(self._sock.fileno(), select.EPOLLIN)
        self._state = "running"
        _servers.add(self)

    def _launch(self, sock_fd: int, lifeline: int) -> subprocess.Popen[bytes]:
        path = [*self._paths, *(entry or os.getcwd() for entry in sys.path)]
        arguments = (
            sock_fd,
            lifeline,
            self._server,
            self._target,
            self._preload,
            self._cleanup,
            self._capture,
        )
        code = f"import sys; sys.path[:] = {path!r}; from workers.template import main; main(*{arguments!r})"
        flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        return subprocess.Popen(
            [sys.executable, *flags, "-c", code],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **lineage.environment(self._server)},
            pass_fds=(sock_fd, lifeline),
            process_group=0,
        )

    def fork(self, token: int, config: bytes, fds: Sequence[int] = ()) -> None:
        """Ask for a worker: `Forked` or `ForkFailed` with `token` follows. May be called before `Ready`.

        `fds` (up to 249) are duplicated for the worker, whose target gets their numbers there, close-on-exec;
        the caller may close its own at once. `config` may have any size.
        """
        if self._state == "gone":
            return  # `Gone` was reported, which settles all tokens
        if self._state != "running":
            raise RuntimeError(f"the fork server is {self._state}")
        passed = list(fds)
        if len(passed) >= template.MAX_FDS:
            raise ValueError(f"{len(passed)} descriptors for one worker; the limit is {template.MAX_FDS - 1}")
        if len(config) <= template.MAX_MESSAGE:
            self._send(template.COMMAND.pack(template.FORK, token, 0, len(passed)) + config, passed)
            return
        with open(os.memfd_create("acomm-config"), "wb") as file:
            file.write(config)
            file.flush()
            passed.insert(0, file.fileno())
            self._send(template.COMMAND.pack(template.FORK_MEMFD, token, 0, len(passed)), passed)

    def kill(self, pid: int, sig: int = signal.SIGKILL) -> bool:
        """Signal the whole process group of a worker; False if `pid` is no worker that is known to live.

        After the worker's death, descendants that left the group are killed too.
        """
        if pid not in self._live or self._state != "running":
            return False
        self._send(template.COMMAND.pack(template.KILL, pid, sig, 0), [])
        return True

    def end(self, pid: int, graces: Graces) -> bool:
        """Have a worker write its stack, for `Exited.said`, and then exit; killed if that takes longer than
        `graces`. False if `pid` is no worker that is known to live. `kill` is still possible.
        """
        if pid not in self._live or self._state != "running":
            return False
        self._send(template.COMMAND.pack(template.END, pid, 0, 0) + template.GRACES.pack(*graces), [])
        return True

    def clean(self, paths: Sequence[str]) -> None:
        """From now on these are what the template removes at its end."""
        if self._state == "running":
            data = b"\0".join(os.fsencode(os.path.abspath(path)) for path in paths)
            self._send(template.COMMAND.pack(template.CLEAN, 0, 0, 0) + data, [])

    def dismiss(self) -> None:
        """Have the template exit, and the kernel kill its workers; returns at once, `Gone` follows. Even one
        that still imports, unless C code keeps it: `kill_template`.
        """
        if self._state == "running":
            self._drop_outbox()
            self._lifeline.close()
            with suppress(OSError):  # it is dead already
                self._sock.shutdown(socket.SHUT_WR)

    def kill_template(self) -> None:
        """Kill the template; `Gone` follows."""
        if self._state == "running":
            self._process.kill()

    def fileno(self) -> int:
        """One descriptor that polls readable when `events` has something to do."""
        return self._poller.fileno()

    def events(self) -> list[Event]:
        """What has happened since the last call; never blocks."""
        found: list[Event] = []
        if self._state != "running":
            return found
        self._flush()
        while True:
            try:
                data = self._sock.recv(template.MAX_MESSAGE)
            except BlockingIOError:
                return found
            except ConnectionResetError:
                continue  # it died with commands unread; its last words and the end are still to be read
            if not data:
                found.append(Gone(tuple(self._live)))
                self._bury()
                return found
            found.append(self._decode(data))

    def close(self, timeout: float = 5.0) -> None:
        """Kill the template, all workers and their descendants; returns when the template is dead.

        That takes milliseconds; after `timeout` seconds a template that cannot finish is killed.
        """
        if self._state == "new":
            self._state = "closed"
        if self._state == "closed":
            return
        self._release()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode:
            lineage.kill_all(self._server)
        self._live.clear()
        self._state = "closed"

    # -- messages

    def _decode(self, data: bytes) -> Event:
        kind, token, pid, status, max_rss, cpu = template.EVENT.unpack_from(data)
        tail = data[template.EVENT.size :]
        text = "" if kind == template.EXITED else tail.decode("utf-8", "replace")
        match kind:
            case template.READY:
                return Ready()
            case template.FORKED:
                self._live[pid] = token
                return Forked(token, pid)
            case template.EXITED:
                self._live.pop(pid, None)
                return Exited(token, pid, status, max_rss, cpu, unpack(tail[1:]), bool(tail[0]))
            case template.FORK_FAILED:
                return ForkFailed(token, text)
            case _:
                message, _, trace = text.partition("\n")
                return Failed(message, trace)

    def _send(self, data: bytes, fds: list[int]) -> None:
        # Queued with descriptors of our own, as the caller may close its; most leave at once.
        self._outbox.append((data, [os.dup(fd) for fd in fds]))
        self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox:
                data, fds = self._outbox[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                self._sock.sendmsg([data], rights)
                self._outbox.popleft()
                _close_all(fds)
        except BlockingIOError:
            pass  # a template that still preloads; the poller says when there is room
        except ConnectionError:
            self._drop_outbox()  # dead; `events` finds out at the end of the socket
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._outbox else 0)
        self._poller.modify(self._sock.fileno(), wanted)

    def _drop_outbox(self) -> None:
        while self._outbox:
            _close_all(self._outbox.popleft()[1])

    # -- end

    def _bury(self) -> None:
        """The template is dead: so be its workers."""
        self._lifeline.close()
        lineage.kill_all(self._server)
        self._live.clear()
        self._process.poll()
        self._poller.unregister(self._sock.fileno())
        self._state = "gone"

    def _release(self) -> None:
        _servers.discard(self)
        self._drop_outbox()
        self._lifeline.close()
        self._poller.close()
        self._sock.close()

    def _abandon(self) -> None:
        """In a fork of the parent: hold nothing that would keep the workers alive after its death."""
        self._release()
        self._process.returncode = 0  # not ours to wait for
        self._state = "closed"


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


_servers: weakref.WeakSet[ForkServer] = weakref.WeakSet()


def _abandon_all() -> None:
    for server in list(_servers):
        server._abandon()


os.register_at_fork(after_in_child=_abandon_all)
