"""`acomm drain`: the supervisor takes no more, finishes all that it has accepted, and is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peers import WAIT
from serving import Fifo, Served, environment
from test_reloading import App

from acomm.calls import Call
from acomm.client import Client, connect
from acomm.errors import BadArgs, ShuttingDown

pytestmark = pytest.mark.process


@contextmanager
def draining(served: Served, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from workers.cli import main; main()", "drain", "--url", served.url]
    with subprocess.Popen(
        [*command, *arguments], env=environment(served.folder), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    App(tmp_path)
    with Served(tmp_path, "--drain-timeout", "0", modules=("app",)) as supervisor:
        yield supervisor


@contextmanager
def holding(served: Served, fifos: tuple[Fifo, Fifo]) -> Iterator[tuple[Client, Call]]:
    """A client, and a call of its that runs until `fifos` let it go."""
    told, go = fifos
    with connect(served.url, wait=0) as client:
        call = client.submit("hold", told.path, go.path)
        assert told.read() == "running"
        yield client, call


def test_it_waits_for_all_that_was_accepted(served: Served, fifos: tuple[Fifo, Fifo]) -> None:
    with holding(served, fifos) as (client, call):
        with draining(served) as command:
            assert served.notified() == "STOPPING=1"
            assert command.stderr is not None
            assert command.stderr.readline().startswith("acomm: left: 1 running")
            with pytest.raises(ShuttingDown):
                client.call("version")
            Path(fifos[1].path).write_text("1")
            assert call.result(WAIT) == "1"
            assert command.wait(WAIT) == 0
        assert served.wait() == 0


def test_it_waits_no_longer_than_it_is_told(served: Served, fifos: tuple[Fifo, Fifo]) -> None:
    with holding(served, fifos) as (_, call):
        with draining(served, "--timeout", "0.1") as command:
            with pytest.raises(ShuttingDown):
                call.result(WAIT)
            assert command.wait(WAIT) == 0
        assert served.wait() == 0


def test_a_signal_ends_the_patience(served: Served, fifos: tuple[Fifo, Fifo]) -> None:
    with holding(served, fifos) as (client, call):
        client.call("acomm.drain")
        assert served.notified() == "STOPPING=1"
        served.signal(signal.SIGTERM)
        with pytest.raises(ShuttingDown):
            call.result(WAIT)
        assert served.wait() == 0


def test_what_it_is_told_is_checked(served: Served) -> None:
    with connect(served.url) as client:
        for arguments in (["soon"], [-1], [1, 2], [True]):
            with pytest.raises(BadArgs):
                client.call("acomm.drain", *arguments)
        assert client.call("version") == "version 1"
