"""The floors: what the machine does with no pool at all."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.pools.functions import spin


@contextmanager
def _forked(run: object, *args: object) -> Iterator[int]:
    """A child that runs `run(*args)` and exits, whatever happens there."""
    if (pid := os.fork()) == 0:
        try:
            run(*args)  # type: ignore[operator]
            os._exit(0)
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"the bare process ended with status {status}")


def pipe_pings(calls: int) -> list[float]:
    """Seconds of each round trip of a few bytes through two pipes, to a process that sends them back."""
    there_read, there_write = os.pipe()
    back_read, back_write = os.pipe()

    def serve() -> None:
        os.close(there_write)
        while data := os.read(there_read, 64):
            os.write(back_write, data)

    def ping(value: int) -> float:
        data = b"%d" % value
        started = time.perf_counter()
        os.write(there_write, data)
        found = os.read(back_read, 64)
        seconds = time.perf_counter() - started
        if found != data:
            raise AssertionError(f"{value} did not come back")
        return seconds

    with _forked(serve):
        try:
            for value in range(100):
                ping(value)
            return [ping(value) for value in range(calls)]
        finally:
            os.close(there_write)


def zmq_pings(calls: int) -> list[float]:
    """The same from a DEALER socket to a ROUTER socket, over ipc."""
    with tempfile.TemporaryDirectory(prefix="acomm-bench-") as folder:
        address = f"ipc://{Path(folder, 'router')}"

        def serve() -> None:
            import zmq  # after the fork: a context does not survive one

            with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
                router.bind(address)
                while True:
                    sender, data = router.recv_multipart()
                    router.send_multipart([sender, data])
                    if not data:
                        router.close(linger=1000)
                        return

        with _forked(serve):
            import zmq

            with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
                dealer.connect(address)

                def ping(data: bytes) -> float:
                    started = time.perf_counter()
                    dealer.send(data)
                    found = dealer.recv()
                    seconds = time.perf_counter() - started
                    if found != data:
                        raise AssertionError(f"{data!r} did not come back")
                    return seconds

                for value in range(100):
                    ping(b"%d" % value)
                each = [ping(b"%d" % value) for value in range(calls)]
                ping(b"")
                return each


def spinning(processes: int, calls: int, turns: int) -> float:
    """Seconds until `processes` forked processes have done `calls` calls of `spin`, shared out beforehand."""

    def work(number: int) -> None:
        for _ in range(number, calls, processes):
            spin(turns)

    started = time.perf_counter()
    contexts = [_forked(work, number) for number in range(processes)]
    for context in contexts:
        context.__enter__()
    for context in contexts:
        context.__exit__(None, None, None)
    return time.perf_counter() - started
