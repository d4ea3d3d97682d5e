"""The fork server with real processes: what is reported, and that nothing survives what should kill it."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from workers.forkserver import Event, Exited, Failed, Forked, ForkFailed, ForkServer, Gone, Ready

pytestmark = pytest.mark.process

DEADLINE = 30.0
"""Seconds; generous, as the machine may be busy. Nothing here waits for it unless it fails."""

TARGETS = '''
import atexit, json, os, random, resource, signal, socket, subprocess, sys, time

LOADED_BY = os.getpid()

@atexit.register
def leave():
    if os.getpid() != LOADED_BY:
        os.write(2, b"atexit of the template ran in a worker")

def tell(fd, **what):
    os.write(fd, json.dumps(what).encode() + b"\\n")

def escape(tell_fd, depth=1):
    """A descendant that left the group: a child (depth 1) or a daemon whose parent has exited (2)."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if depth > 1 and os.fork():
            os._exit(0)
        tell(write, pid=os.getpid())
        time.sleep(1000)
        os._exit(0)
    pid = json.loads(os.read(read, 100))["pid"]
    if depth > 1:
        os.wait()
    os.close(read), os.close(write)
    return pid

def crunch():
    sum(range(10**10))

def state(fd):
    tell(fd, pid=os.getpid(), group=os.getpgrp(), mine=LOADED_BY != os.getpid(), random=random.random(),
         oom=int(open("/proc/self/oom_score_adj").read()), stdin=os.readlink("/proc/self/fd/0"),
         sigint=signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
         sigterm=signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
         sigchld=signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
         blocked=len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
         descriptors=len(os.listdir("/proc/self/fd")), main=sys.modules["__main__"].__dict__.get("__file__"))

def memory():
    data = bytearray(64 << 20)
    for i in range(0, len(data), 4096):
        data[i] = 1

def run(config, fds):
    name, _, argument = config.decode().partition(" ")
    if name == "exit":
        sys.exit(int(argument))
    if name == "signal":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), int(argument))
    if name == "raise":
        raise ValueError("on purpose")
    if name == "dump":
        signal.raise_signal(signal.SIGUSR1)
    if name == "memory":
        memory()
    if name == "atexit":
        atexit.register(lambda: tell(fds[0], ran="own"))
    if name == "state":
        state(fds[0])
    if name == "length":
        tell(fds[0], length=len(config))
    if name == "send":
        for fd in fds:
            os.write(fd, argument.encode())
    if name == "crunch":
        tell(fds[0], pids=[os.getpid()])
        crunch()
    if name in ("family", "orphans"):
        plain = subprocess.Popen(["sleep", "1000"])
        session = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        bare = subprocess.Popen(["sleep", "1000"], start_new_session=True, env={})
        pids = [os.getpid(), plain.pid, session.pid, bare.pid, escape(fds[0]), escape(fds[0], 2)]
        tell(fds[0], pids=pids)
        if name == "orphans":
            os._exit(7)
        crunch()
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fs_targets.py").write_text(TARGETS)
    return tmp_path


E = TypeVar("E")


class Watch:
    """A fork server, and the events that it reported so far."""

    def __init__(self, server: ForkServer) -> None:
        self.server = server
        self.seen: list[Event] = []

    def until(self, done: Callable[[list[Event]], bool]) -> list[Event]:
        poller = select.poll()
        poller.register(self.server.fileno(), select.POLLIN)
        deadline = time.monotonic() + DEADLINE
        while not done(self.seen):
            assert poller.poll(max(0.0, deadline - time.monotonic()) * 1000), self.seen
            self.seen += self.server.events()
        return self.seen

    def first(self, kind: type[E], token: int | None = None) -> E:
        def matching() -> list[E]:
            return [
                e for e in self.seen if isinstance(e, kind) and token in (None, getattr(e, "token", None))
            ]

        self.until(lambda _: bool(matching()))
        return matching()[0]

    def run(self, config: str, fds: list[int] | None = None, token: int = 1) -> Exited:
        self.server.fork(token, config.encode(), fds or [])
        return self.first(Exited, token)


@pytest.fixture
def watch(folder: Path) -> Iterator[Watch]:
    with ForkServer(["fs_targets"], paths=[str(folder)], target="fs_targets:run") as server:
        yield Watch(server)


class Told:
    """A pipe on which a worker tells one line of JSON."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.read_end)
        os.close(self.write_end)

    def line(self) -> dict[str, object]:
        ready, _, _ = select.select([self.read_end], [], [], DEADLINE)
        assert ready
        return json.loads(os.read(self.read_end, 4096))


def pidfds(pids: list[int]) -> dict[int, int]:
    """Descriptors that poll readable when their process is dead, whoever its parent is."""
    handles = {}
    for pid in pids:
        with suppress(ProcessLookupError):
            handles[pid] = os.pidfd_open(pid)
    return handles


def wait_dead(handles: dict[int, int]) -> None:
    """All are dead within the deadline; closes the handles."""
    deadline = time.monotonic() + DEADLINE
    late = []
    for pid, handle in handles.items():
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            late.append(pid)
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    assert not late


def open_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_five_workers_fork_and_exit(watch: Watch) -> None:
    for token in range(5):
        watch.server.fork(token, b"exit %d" % token)  # before Ready: it waits for the template
    watch.until(lambda seen: sum(isinstance(e, Exited) for e in seen) == 5)
    assert watch.seen[0] == Ready()
    forked = {e.token: e.pid for e in watch.seen if isinstance(e, Forked)}
    exited = {e.token: e for e in watch.seen if isinstance(e, Exited)}
    assert {token: e.pid for token, e in exited.items()} == forked
    assert [exited[token].status for token in range(5)] == [0, 1, 2, 3, 4]
    assert repr(watch.server) == "<ForkServer running, 0 workers>"


def test_the_end_of_a_worker_is_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ForkServer(["fs_targets"], paths=[str(folder)], target="fs_targets:run") as server:
        watch = Watch(server)
        assert watch.run("return", token=1).status == 0
        assert watch.run(f"signal {int(signal.SIGSEGV)}", token=2).status == -signal.SIGSEGV
        assert watch.run("raise", token=3).status == 1
        assert watch.run("dump", token=4).status == 0
    errors = capfd.readouterr().err
    assert "Fatal Python error: Segmentation fault" in errors
    assert "ValueError: on purpose" in errors
    assert errors.count("(most recent call first)") == 2  # of the crash, and the one asked for by SIGUSR1
    assert "atexit of the template" not in errors


def test_peak_memory_and_cpu_time(watch: Watch) -> None:
    small, large = watch.run("return", token=1), watch.run("memory", token=2)
    assert large.max_rss - small.max_rss > 48 << 20
    assert 0 < large.cpu < DEADLINE


def test_a_worker_starts_clean(watch: Watch) -> None:
    with Told() as told:
        end = watch.run("state", [told.write_end])
        state = told.line()
        watch.run("state", [told.write_end], token=2)
        assert told.line()["random"] != state["random"]
        watch.run("atexit", [told.write_end], token=3)
        assert told.line() == {"ran": "own"}
    assert state["pid"] == state["group"] == end.pid
    assert state["mine"]
    assert state["stdin"] == "/dev/null"
    assert state["sigint"] and state["sigterm"] and state["sigchld"]
    assert state["blocked"] == 0
    assert state["descriptors"] == 7  # standard ones, faulthandler's, the lifeline, the pipe, the listing
    assert state["main"] is None
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert state["oom"] == min(1000, own + 500)


def test_descriptors_and_large_configs_arrive(watch: Watch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Told() as told:
        watch.server.fork(1, b"send hello", [theirs.fileno(), told.write_end])
        theirs.close()
        ours.settimeout(DEADLINE)
        assert ours.recv(100) == b"hello"
        assert ours.recv(100) == b""  # nobody else has it
        assert os.read(told.read_end, 100) == b"hello"
        size = 3_000_000
        watch.server.fork(2, b"length".ljust(size), [told.write_end])
        assert told.line() == {"length": size}


def test_a_c_call_is_killed(watch: Watch) -> None:
    with Told() as told:
        watch.server.fork(1, b"crunch", [told.write_end])
        pid = watch.first(Forked).pid
        told.line()
    assert watch.server.kill(pid)
    assert watch.first(Exited).status == -signal.SIGKILL
    assert not watch.server.kill(pid)


def test_sigterm_ends_a_worker_and_sigint_does_not(watch: Watch) -> None:
    with Told() as told:
        watch.server.fork(1, b"family", [told.write_end])
        pid = watch.first(Forked).pid
        told.line()
    watch.server.kill(pid, signal.SIGINT)
    watch.server.kill(pid, signal.SIGTERM)
    assert watch.first(Exited).status == -signal.SIGTERM


@pytest.mark.parametrize(("config", "status"), [("family", -signal.SIGKILL), ("orphans", 7)])
def test_descendants_die_with_their_worker_and_no_other(watch: Watch, config: str, status: int) -> None:
    with Told() as told:
        watch.server.fork(1, b"family", [told.write_end])
        bystanders = told.line()["pids"]
        watch.server.fork(2, config.encode(), [told.write_end])
        pid = watch.first(Forked, 2).pid
        handles = pidfds(told.line()["pids"])
    if config == "family":
        assert len(handles) == 6
        watch.server.kill(pid)
    wait_dead(handles)
    assert watch.first(Exited, 2).status == status
    # Nothing of the other worker was hit; its bare, escaped child still has its parent.
    assert watch.run("return", token=3).status == 0
    family = pidfds(bystanders)
    poller = select.poll()
    for handle in family.values():
        poller.register(handle, select.POLLIN)
    assert len(family) == 6
    assert poller.poll(0) == []
    watch.server.close()
    wait_dead(family)


PARENT = """
    import os, select, sys
    from workers.forkserver import ForkServer
    folder, tell = sys.argv[1], int(sys.argv[2])
    cleanup = [folder + "/sockets"]
    server = ForkServer(["fs_targets"], paths=[folder], target="fs_targets:run", cleanup=cleanup)
    server.start()
    os.write(tell, b'{"template": %d}\\n' % server.pid)
    for token in range(2):
        server.fork(token, b"family", [tell])
    if os.fork() == 0:  # a plain fork of the host must not keep the workers alive
        select.select([], [], [])
    while True:
        select.select([server.fileno()], [], [])
        server.events()
"""


def start_parent(folder: Path, told: Told) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A program with a fork server and two workers with descendants; the pids of all that must die."""
    (folder / "sockets").mkdir()
    (folder / "sockets" / "worker.sock").write_text("")
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(folder), str(told.write_end)],
        pass_fds=[told.write_end],
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )
    pids: list[int] = []
    lines = 0
    while lines < 3:
        ready, _, _ = select.select([told.read_end], [], [], DEADLINE)
        assert ready
        for line in os.read(told.read_end, 4096).splitlines():
            what = json.loads(line)
            pids += what.get("pids", [what.get("template")])
            lines += 1
    return parent, pids


def test_nothing_survives_a_killed_parent(
    folder: Path, record_property: Callable[[str, object], None]
) -> None:
    with Told() as told:
        parent, pids = start_parent(folder, told)
        handles = pidfds(pids)
        assert len(handles) == 13
        started = time.perf_counter()
        parent.kill()
        wait_dead(handles)
        took = time.perf_counter() - started
        record_property("seconds", took)
        print(f"parent killed, 13 processes dead after {took * 1000:.1f} ms")
        os.killpg(parent.pid, signal.SIGKILL)  # the plain fork
        parent.wait()
    assert not (folder / "sockets").exists()


def test_the_lifeline_needs_no_template(folder: Path) -> None:
    with Told() as told:
        parent, pids = start_parent(folder, told)
        template, *workers = pids
        os.kill(template, signal.SIGSTOP)
        groups = pidfds([pid for pid in workers if os.getpgid(pid) in workers[::6]])
        others = pidfds([pid for pid in pids if pid not in groups])
        assert len(groups) == 4  # two workers, each with a plain subprocess
        parent.kill()
        wait_dead(groups)
        os.kill(template, signal.SIGCONT)
        wait_dead(others)
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert not (folder / "sockets").exists()


def test_a_lifeline_that_ended_before_it_was_armed() -> None:
    code = (
        "import os; from workers.forked import arm_lifeline; r, w = os.pipe(); os.close(w); arm_lifeline(r)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], process_group=0, cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL


def test_nothing_survives_a_killed_template(watch: Watch) -> None:
    with Told() as told:
        watch.server.fork(1, b"family", [told.write_end])
        pid = watch.first(Forked).pid
        pids = told.line()["pids"]
        assert isinstance(pids, list)
        bare = pids.pop(3)  # no mark and not in the group: the documented limit
        handles = pidfds(pids)
    os.kill(watch.server.pid, signal.SIGKILL)
    assert watch.first(Gone) == Gone((pid,))
    wait_dead(handles)
    os.kill(bare, signal.SIGKILL)
    assert watch.server.events() == []
    watch.server.fork(2, b"return")  # settled by Gone
    assert not watch.server.kill(pid)


def test_close_does_not_wait_for_a_stopped_template(watch: Watch) -> None:
    with Told() as told:
        watch.server.fork(1, b"family", [told.write_end])
        watch.first(Forked)
        pids = told.line()["pids"]
        assert isinstance(pids, list)
        bare = pids.pop(3)
        handles = pidfds(pids)
    os.kill(watch.server.pid, signal.SIGSTOP)
    watch.server.close(timeout=0.1)
    wait_dead(handles)
    os.kill(bare, signal.SIGKILL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n1 / 0\n", "fs_bad: ZeroDivisionError: division by zero ({}:2)"),
        ("import fs_missing", "fs_bad: ModuleNotFoundError: No module named 'fs_missing' ({}:1)"),
        ("def f(:", "fs_bad: SyntaxError: invalid syntax ({}:1)"),
        ("import sys; sys.exit('no')", "fs_bad: SystemExit: no ({}:1)"),
        ("import os", "fs_bad:run: AttributeError: module 'fs_bad' has no attribute 'run' (not found)"),
    ],
)
def test_a_bad_preload_is_told_in_one_line(tmp_path: Path, source: str, message: str) -> None:
    bad = tmp_path / "fs_bad.py"
    bad.write_text(source)
    with ForkServer(["fs_bad"], paths=[str(tmp_path)], target="fs_bad:run") as server:
        server.fork(1, b"")
        wait_dead(pidfds([server.pid]))  # its words are read even if it died with our command unread
        watch = Watch(server)
        watch.first(Gone)
        (failed,) = [event for event in watch.seen if isinstance(event, Failed)]
    assert failed.message == message.format(bad)
    assert "Traceback" in failed.traceback or "SyntaxError" in failed.traceback


def test_an_import_that_never_ends_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "fs_slow.py").write_text(
        f"import time\nopen({str(tmp_path / 'started')!r}, 'w').close()\ntime.sleep(1000)"
    )
    os.mkfifo(tmp_path / "started")
    with ForkServer(["fs_slow"], paths=[str(tmp_path)], target="fs_slow:run") as server:
        with open(tmp_path / "started"):
            pass
    assert server._process.returncode == 0


def test_fork_failure_is_reported_and_survived(folder: Path) -> None:
    (folder / "fs_failing.py").write_text(
        "import errno, os\nfrom fs_targets import run\n_fork, _left = os.fork, [1]\n"
        "def fork():\n    if _left:\n        _left.pop()\n"
        "        raise BlockingIOError(errno.EAGAIN, 'Resource temporarily unavailable')\n"
        "    return _fork()\n"
        "os.fork = fork\n"
    )
    with ForkServer([], paths=[str(folder)], target="fs_failing:run") as server:
        watch = Watch(server)
        server.fork(1, b"return")
        assert watch.first(ForkFailed) == ForkFailed(1, "fork: EAGAIN: Resource temporarily unavailable")
        assert watch.run("return", token=2).status == 0


def test_two_hundred_cycles_leave_no_descriptors(watch: Watch) -> None:
    with Told() as told:
        watch.run("return", [told.write_end], token=0)
        before = open_fds(os.getpid()), open_fds(watch.server.pid)
        for token in range(1, 201):
            watch.server.fork(token, b"return", [told.write_end])
        watch.until(lambda seen: sum(isinstance(e, Exited) for e in seen) == 201)
        assert (open_fds(os.getpid()), open_fds(watch.server.pid)) == before


def test_a_parent_that_does_not_read_loses_no_event(watch: Watch) -> None:
    count = 1500  # more than a socket buffer of commands, and of events
    for token in range(count):
        watch.server.fork(token, b"return")
    watch.until(lambda seen: sum(isinstance(e, Exited) for e in seen) == count)
    assert [e.token for e in watch.seen if isinstance(e, Forked)] == list(range(count))


def test_close_removes_the_cleanup_paths(folder: Path) -> None:
    (folder / "sockets").mkdir()
    (folder / "sockets" / "a").write_text("")
    (folder / "lone").write_text("")
    (folder / "link").symlink_to(folder / "fs_targets.py")
    cleanup = [str(folder / name) for name in ("sockets", "lone", "link", "missing")]
    before = open_fds(os.getpid())
    server = ForkServer(["fs_targets"], paths=[str(folder)], target="fs_targets:run", cleanup=cleanup)
    server.close()
    with pytest.raises(RuntimeError, match="closed"):
        server.start()
    with ForkServer(["fs_targets"], paths=[str(folder)], target="fs_targets:run", cleanup=cleanup) as server:
        watch = Watch(server)
        watch.first(Ready)
    server.close()
    assert [Path(path).exists() for path in cleanup] == [False] * 4
    assert (folder / "fs_targets.py").exists()
    assert open_fds(os.getpid()) == before
    with pytest.raises(RuntimeError, match="closed"):
        server.fork(1, b"")
