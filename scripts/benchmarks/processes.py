"""Baselines that live in a process of their own."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

START_TIMEOUT = 30.0
Serve = Callable[[str, Connection], None]


@contextmanager
def serving(serve: Serve) -> Iterator[str]:
    """Run `serve(path, ready)` in a new process; yields the path once `ready` has been sent anything."""
    with tempfile.TemporaryDirectory(prefix="acomm-bench-") as folder:
        path = str(Path(folder, "server.sock"))
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(path, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            if not ours.poll(START_TIMEOUT):
                raise RuntimeError(f"{serve.__module__} did not start")
            ours.recv()
            yield path
        finally:
            process.kill()
            process.join()
