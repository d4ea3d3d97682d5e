"""Honest callers among slow peers: a supervisor that is filled with connections which say one byte, and then
has no descriptors left.

    holders (processes) --10,000 connections, a byte each--> supervisor <--calls-- an honest caller
                                                                        <--a call each-- newcomers

A holder whose connection is cut opens another at once. The caller is connected before they come; a newcomer
connects, calls and leaves, and comes back when it is told to.
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
from typing import NamedTuple

import psutil

from acomm.client import Client, connect
from acomm.errors import Busy, ConnectionLost, Unreachable
from acomm.urls import unix_path
from benchmarks.harness import Figures, percentiles
from workers import launch

HOLDERS = 5
CALLS = 2000
NEWCOMERS = 400
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


class Newcomers(NamedTuple):
    """The time from connecting to the answer, with the pauses of those that were told to come back, of whom
    there were `refused`.
    """

    figures: Figures
    refused: int


def newcomers(url: str, count: int) -> Newcomers:
    """One after the other, each on a connection of its own."""
    each, refused = [], 0
    for value in range(count):
        started = time.perf_counter()
        while True:
            try:
                with connect(url, wait=0) as client:
                    found = client.call("echo", value)
                break
            except Busy as busy:
                refused += 1
                time.sleep(busy.retry_after or 0.0)
            except (ConnectionLost, Unreachable):  # cut off without a word, as one of too many
                refused += 1
        if found != value:
            raise AssertionError(f"{value} did not come back")
        each.append(time.perf_counter() - started)
    return Newcomers(percentiles(each), refused)


def run(arguments: Sequence[str], machine: str) -> int:
    """Returns the exit status: 1 if the supervisor has died, or takes more memory than it may."""
    parser = argparse.ArgumentParser(prog="scripts/bench overload", description="Slow peers, no descriptors.")
    parser.add_argument("--peers", type=int, default=10_000, metavar="N", help="default: %(default)s")
    given = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(machine, flush=True)
    print(
        f"honest calls, {CALLS} one after the other, and of {NEWCOMERS} newcomers; {given.peers} slow peers",
        flush=True,
    )
    with launch("benchmarks.tasks", workers=2) as client:
        path = unix_path(client.url)
        assert path is not None
        supervisor = psutil.Process(client.stats()["pid"])
        calls(client)
        newcomers(client.url, 20)
        base = _state("alone", client, supervisor)
        with held(path, given.peers):
            _state("among slow peers", client, supervisor, base)
            _state("among them, later", client, supervisor, base)
            limits = supervisor.rlimit(psutil.RLIMIT_NOFILE)
            resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, (supervisor.num_fds(), limits[1]))
            with held(path, given.peers // 5):
                _line("and no descriptors", calls(client), supervisor, client, base[0])
            resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, limits)
        _state("alone again", client, supervisor, base)
        most = client.stats()["max_rss"]
    print(f"the supervisor's largest memory: {most / 2**20:.0f} MiB")
    return int(most > MAX_RSS)


Base = tuple[Figures, Figures]
"""Those of a connected caller, and of newcomers."""


def _state(what: str, client: Client, supervisor: psutil.Process, base: Base | None = None) -> Base:
    connected = _line(what, calls(client), supervisor, client, None if base is None else base[0])
    new = newcomers(client.url, NEWCOMERS)
    told = _told(new.figures, None if base is None else base[1])
    print(f"{'  newcomers':20} {told}; {new.refused} told to come back", flush=True)
    return connected, new.figures


def _told(figures: Figures, base: Figures | None) -> str:
    ratio = "" if base is None else f" ({figures['µs p99'] / base['µs p99']:.2f})"
    return f"p50 {figures['µs p50']:7,.0f} µs, p99 {figures['µs p99']:7,.0f} µs{ratio}"


def _line(
    what: str, figures: Figures, supervisor: psutil.Process, client: Client, base: Figures | None = None
) -> Figures:
    room = client.stats()["room"]
    print(
        f"{what:20} {_told(figures, base)}; "
        f"{room['connections']} connections, {room['shed']} shed, {room['refused']} refused, "
        f"{supervisor.memory_info().rss / 2**20:.0f} MiB",
        flush=True,
    )
    return figures
