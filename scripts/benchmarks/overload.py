"""Honest callers among slow peers: a supervisor that is filled with connections which say one byte, and then
has no descriptors left.

    holders (processes) --10,000 connections, a byte each--> supervisor <--calls-- an honest caller

A holder whose connection is cut opens another at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import psutil

from acomm.client import Client
from acomm.urls import unix_path
from benchmarks.harness import Figures, percentiles
from workers import launch

HOLDERS = 5
CALLS = 2000
MAX_RSS = 256 * 1024 * 1024
_PAUSE = 0.001  # seconds between two reconnects of one holder: it is slow, not a flood


def hold(path: str, count: int, ready: Connection) -> None:
    """Keep `count` connections open that never say more than a byte."""
    poll = select.epoll()
    held: dict[int, socket.socket] = {}

    def knock() -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        with suppress(OSError):
            sock.connect(path)
            sock.send(b"\0")
        held[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)

    for _ in range(count):
        knock()
    ready.send(True)
    while True:
        for fd, _ in poll.poll():
            sock = held[fd]
            try:
                told = sock.recv(4096)
            except OSError:
                told = b""
            if not told:
                poll.unregister(fd)
                del held[fd]
                sock.close()
                time.sleep(_PAUSE)
                knock()


@contextmanager
def held(path: str, count: int) -> Iterator[None]:
    """So many slow peers, in some processes."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for number in range(HOLDERS):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            share = count // HOLDERS + (number < count % HOLDERS)
            process = context.Process(target=hold, args=(path, share, theirs), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            if not pipe.poll(120):
                raise RuntimeError("the slow peers did not get in")
            pipe.recv()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def calls(client: Client) -> Figures:
    """One after the other, each checked."""
    each = []
    for value in range(CALLS):
        started = time.perf_counter()
        if client.call("echo", value) != value:
            raise AssertionError(f"{value} did not come back")
        each.append(time.perf_counter() - started)
    return percentiles(each)


def run(arguments: Sequence[str], machine: str) -> int:
    """Returns the exit status: 1 if the supervisor has died, or takes more memory than it may."""
    parser = argparse.ArgumentParser(prog="scripts/bench overload", description="Slow peers, no descriptors.")
    parser.add_argument("--peers", type=int, default=10_000, metavar="N", help="default: %(default)s")
    given = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(machine, flush=True)
    print(f"honest calls, {CALLS} one after the other; {given.peers} slow peers", flush=True)
    with launch("benchmarks.tasks", workers=2) as client:
        path = unix_path(client.url)
        assert path is not None
        supervisor = psutil.Process(client.stats()["pid"])
        calls(client)
        base = _line("alone", calls(client), supervisor, client)
        with held(path, given.peers):
            _line("among slow peers", calls(client), supervisor, client, base)
            _line("among them, later", calls(client), supervisor, client, base)
            limits = supervisor.rlimit(psutil.RLIMIT_NOFILE)
            resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, (supervisor.num_fds(), limits[1]))
            with held(path, given.peers // 5):
                _line("and no descriptors", calls(client), supervisor, client, base)
            resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, limits)
        _line("alone again", calls(client), supervisor, client, base)
        most = client.stats()["max_rss"]
    print(f"the supervisor's largest memory: {most / 2**20:.0f} MiB")
    return int(most > MAX_RSS)


def _line(
    what: str, figures: Figures, supervisor: psutil.Process, client: Client, base: Figures | None = None
) -> Figures:
    room = client.stats()["room"]
    ratio = "" if base is None else f" ({figures['µs p99'] / base['µs p99']:.2f})"
    print(
        f"{what:20} p50 {figures['µs p50']:7,.0f} µs, p99 {figures['µs p99']:7,.0f} µs{ratio}; "
        f"{room['connections']} connections, {room['shed']} shed, {room['refused']} refused, "
        f"{supervisor.memory_info().rss / 2**20:.0f} MiB",
        flush=True,
    )
    return figures
