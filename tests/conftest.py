"""What tests share. A module that sets BOTH_LOOPS runs its async tests on asyncio's and uvloop's loops."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from leftovers import Leftovers
from serving import Fifo

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # We are a shell's background job. Programs that tests start would inherit that, and not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes is the machine's affair, which others may use.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


uvloop.new_event_loop().close()  # the first one makes what all share: nobody's leftovers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=1, help="how often the fault tests repeat what they do")


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    item: pytest.Function,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if getattr(item.module, "BOTH_LOOPS", False):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test of processes this one has what it had before: descriptors, threads, children."""
    if not request.node.get_closest_marker("process") or request.node.get_closest_marker("untidy"):
        yield
        return
    leftovers = Leftovers()
    yield
    left = leftovers.found()
    assert left == [], "\n".join(left)


@pytest.fixture
def folder_for_all() -> Iterator[Path]:
    """A folder that other users can enter, which pytest's own are not, and whose path is short."""
    folder = Path(tempfile.mkdtemp(prefix="acomm-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder of ours whose path leaves room for a socket's, which pytest's own may not."""
    with tempfile.TemporaryDirectory(prefix="acomm-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    """A named pipe that nobody has opened: each end waits for the other."""
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "started")
    yield fifo
    fifo.close()


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "release")
    yield fifo
    fifo.close()


@pytest.fixture
def fifos(started: Fifo, release: Fifo) -> tuple[Fifo, Fifo]:
    """What a task tells that it has begun, and what it waits for."""
    return started, release


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> range:
    return range(request.config.getoption("--rounds"))
