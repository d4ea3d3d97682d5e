"""How the fork server ends workers, and what it tells of their ends, with real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_forkserver import Told, Watch

from workers.ending import Graces
from workers.forkserver import Exited, Forked, ForkServer
from workers.tails import DUMP, STDERR, STDOUT, text_since

pytestmark = pytest.mark.process

TARGETS = """
import os, signal, subprocess, sys, time
from workers import oomkills

COUNTER = os.environ["FS_COUNTER"]
oomkills._count = lambda path: int(open(COUNTER).read())

def run(config, fds):
    name, _, argument = config.decode().partition(" ")
    if name == "print":
        print("out")
        print("err", file=sys.stderr)
        subprocess.run(["sh", "-c", "echo of a child; echo of a child >&2"], check=True)
    if name == "unflushed":
        sys.stdout.write("half a line")
    if name == "term":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(argument)))
    if name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if name in ("term", "deaf", "wait"):
        os.write(fds[0], b"{}\\n")
        time.sleep(1000)
"""


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "counter"
    path.write_text("0")
    monkeypatch.setenv("FS_COUNTER", str(path))
    return path


@contextmanager
def watching(folder: Path) -> Iterator[Watch]:
    """Within a test, so that what is printed is captured."""
    (folder / "fs_ends.py").write_text(TARGETS)
    with ForkServer(["fs_ends"], paths=[str(folder)], target="fs_ends:run") as server:
        yield Watch(server)


@pytest.fixture
def watch(tmp_path: Path, counter: Path) -> Iterator[Watch]:
    with watching(tmp_path) as watch:
        yield watch


def started(watch: Watch, config: str, token: int = 1) -> int:
    """The pid of a worker that waits."""
    with Told() as told:
        watch.server.fork(token, config.encode(), [told.write_end])
        pid = watch.first(Forked, token).pid
        told.line()
    return pid


def test_what_a_worker_and_its_children_print_is_told_and_passed_on(
    tmp_path: Path, counter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with watching(tmp_path) as watch:
        end = watch.run("print")
        assert text_since(end.said, STDOUT, 0.0) == "out\nof a child\n"
        assert text_since(end.said, STDERR, 0.0) == "err\nof a child\n"
        assert [piece.when for piece in end.said if piece.stream == DUMP] == []
        end = watch.run("unflushed", token=2)
        assert text_since(end.said, STDOUT, 0.0) == "half a line"
    assert capfd.readouterr() == ("out\nof a child\nhalf a line", "err\nof a child\n")


@pytest.mark.parametrize(
    ("config", "status"), [("wait", -signal.SIGTERM), ("term 5", 5), ("deaf", -signal.SIGKILL)]
)
def test_a_worker_is_ended_in_steps_and_its_dump_is_for_the_receipt_alone(
    tmp_path: Path, counter: Path, capfd: pytest.CaptureFixture[str], config: str, status: int
) -> None:
    with watching(tmp_path) as watch:
        pid = started(watch, config)
        assert watch.server.end(pid, Graces(dump=0.5, term=0.05 if config == "deaf" else 30.0))
        watch.server.end(pid, Graces())  # a second one changes nothing
        end = watch.first(Exited)
        assert end.status == status and not end.oom
        assert "in run" in text_since(end.said, DUMP, 0.0)
        assert not watch.server.end(pid, Graces())
    assert "in run" not in capfd.readouterr().err


def test_a_dump_that_an_operator_asks_for_is_printed(
    tmp_path: Path, counter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with watching(tmp_path) as watch:
        pid = started(watch, "term 5")
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGTERM)
        assert "in run" in text_since(watch.first(Exited).said, DUMP, 0.0)
    assert "in run" in capfd.readouterr().err


def test_a_kill_is_quicker_than_an_end(watch: Watch) -> None:
    pid = started(watch, "deaf")
    watch.server.end(pid, Graces(dump=30.0, term=1000.0))
    watch.server.kill(pid)
    assert watch.first(Exited).status == -signal.SIGKILL


def test_the_oom_killer_is_likely_where_its_counter_has_moved(watch: Watch, counter: Path) -> None:
    for token, (before, after, likely) in enumerate([(1, 2, True), (2, 2, False), (5, 5, False)]):
        counter.write_text(str(before))
        pid = started(watch, "wait", token)  # what was before its fork is not its own
        counter.write_text(str(after))
        os.kill(pid, signal.SIGKILL)
        assert watch.first(Exited, token).oom == likely
    pid = started(watch, "wait", 7)
    counter.write_text("9")
    watch.server.kill(pid)
    assert not watch.first(Exited, 7).oom  # that was us
    pid = started(watch, "wait", 8)
    counter.write_text("10")
    os.kill(pid, signal.SIGTERM)
    assert not watch.first(Exited, 8).oom
