"""A takeover in which somebody is killed: with a journal, nothing that was acknowledged is lost."""

from __future__ import annotations

import json
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, GrantingPeer, ack, connected, frame, read_all, read_frame
from promised import Promised
from serving import Fifo, Hook, Served, request

from acomm import connect

pytestmark = pytest.mark.process


class Coming(Served):
    """A supervisor that is started, and may be killed before it is ready."""

    def _await_ready(self) -> None:
        pass

    def ready(self) -> None:
        """Wait until it is."""
        super()._await_ready()


Start = Callable[..., Coming]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a supervisor with a journal; the second one takes over from the first, and so on."""
    tmp_path.chmod(0o700)
    with ExitStack() as stack:

        def begin(*more: str) -> Coming:
            given = ("--takeover", "--journal", str(tmp_path / "j.db"), *more)
            return stack.enter_context(Coming(tmp_path, *given, modules=("durabletasks",)))

        yield begin


class Halfway:
    """An old one that runs a call, and a new one that waits for it: the old one has given its sockets, and
    begun to come to its end.
    """

    def __init__(self, start: Start, hook: Hook, started: Fifo, release: Fifo) -> None:
        self.old = start("--drain-timeout", "1000")
        self.old.ready()
        args = [started.path, release.path]
        assert json.loads(self.old.ask(request("runs", "hold", hook.url, args)))["error"] == ""
        started.read()
        with connected(self.old.path) as kept:
            # Without a hook, which might be told again: a delivery is noted when there is time.
            kept.sendall(frame(request("kept", "echo", None, [1], acomm=1)))
            assert json.loads(read_frame(kept))["acomm"] == 1
            self.new = start()
            # Kept connections end when the new one has the sockets and has said that it is ready.
            assert read_all(kept) == b""


class TestHalfway:
    @pytest.fixture
    def hook(self, tmp_path: Path) -> Iterator[Hook]:
        with Hook(tmp_path / "hook") as hook:
            yield hook

    @pytest.fixture
    def halfway(self, start: Start, hook: Hook, started: Fifo, release: Fifo) -> Halfway:
        return Halfway(start, hook, started, release)

    def test_the_old_one_is_killed(
        self, halfway: Halfway, hook: Hook, started: Fifo, release: Fifo, tmp_path: Path
    ) -> None:
        """Whoever knocks meanwhile is served by the new one, which does again what had not ended."""
        with connected(halfway.old.path) as knocks:
            knocks.sendall(frame(request("knocks", "add", hook.url, [20, 22])))
            halfway.old.signal(signal.SIGKILL)
            halfway.new.ready()
            assert json.loads(read_frame(knocks))["error"] == ""
        assert (hook.answer()["id"], halfway.new.stats()["pid"]) == ("knocks", halfway.new.pid)
        started.read()
        release.close()
        answer = hook.answer()
        assert (answer["id"], answer["error"]) == ("runs", "")

    def test_the_new_one_is_killed(self, halfway: Halfway, hook: Hook, release: Fifo) -> None:
        """The old one goes on, as if nobody had come; the next one takes over."""
        with connected(halfway.old.path) as knocks:
            knocks.sendall(frame(request("knocks", "add", hook.url, [20, 22])))
            halfway.new.signal(signal.SIGKILL)
            assert json.loads(read_frame(knocks))["error"] == ""
        assert (hook.answer()["id"], halfway.old.stats()["pid"]) == ("knocks", halfway.old.pid)
        release.close()
        assert hook.answer()["id"] == "runs"

    def test_both_are_killed(
        self, halfway: Halfway, start: Start, hook: Hook, started: Fifo, release: Fifo
    ) -> None:
        with connected(halfway.old.path) as knocks:
            halfway.old.signal(signal.SIGSTOP)
            for each in (halfway.new, halfway.old):
                each.signal(signal.SIGKILL)
                each.wait()
            with pytest.raises((ConnectionError, EOFError)):
                knocks.sendall(frame(request("never", "add", hook.url, [20, 22])))
                read_frame(knocks)
        third = start()
        third.ready()
        started.read()
        release.close()
        assert hook.answer()["id"] == "runs"
        assert json.loads(third.ask(request("third", "add", hook.url, [1])))["error"] == ""
        assert hook.answer()["id"] == "third"


@pytest.mark.parametrize("victim", ["old", "new"])
def test_at_any_moment(rounds: range, start: Start, tmp_path: Path, victim: str) -> None:
    """With a history of clients that never stop. A takeover is timed first, then one of the two is killed in
    each of the next.
    """
    moments = random.Random(len(rounds))
    served = start()
    served.ready()
    kills = 5 * len(rounds)
    with Promised(served.path, tmp_path) as clients:
        clients.more(20)
        began = time.monotonic()
        old, served = served, start()
        served.ready()
        lasts = time.monotonic() - began
        assert old.wait() == 0
        for _ in range(kills):
            clients.more(20)
            old, served = served, start()
            clients.until_over(old.process)
            threading.Event().wait(moments.uniform(0.2, 1.1) * lasts)
            if victim == "old":
                old.signal(signal.SIGKILL)
                served.ready()
            else:
                served.signal(signal.SIGKILL)
                served.wait()
                if clients.more(20, unless_over=old.process):
                    served = old  # it goes on
                else:
                    served = start()
                    served.ready()
        clients.more(20)
        clients.check(deaths=kills)
        assert served.stats()["pid"] == served.pid


@pytest.mark.parametrize("step", ["asked", "acknowledged", "said yes", "come"])
def test_the_old_one_dies_before_it_has_given_anything(start: Start, tmp_path: Path, step: str) -> None:
    """Then nobody is there, and the new one serves."""
    asked: queue.Queue[dict[str, Any]] = queue.Queue()

    def decide(message: dict[str, Any]) -> bytes | None:
        asked.put(message)
        if message["task"] == "acomm.takeover" and step == "asked":
            return None
        return ack(message["id"], acomm=1)

    with GrantingPeer(tmp_path / "s.sock", decide):
        new = start()
        while (message := asked.get(timeout=WAIT))["task"] != "acomm.takeover":
            pass  # a client says first that it is there
        if step in ("said yes", "come"):
            with connected(message["responseHook"]["Path"]) as hook:
                answer = {"id": message["id"], "result": {"pid": 1}, "error": "", "streamURL": None}
                hook.sendall(frame(json.dumps(answer).encode()))
                read_frame(hook)
        if step == "come":
            with connected(message["args"][0]) as line:
                line.sendall(b"\0\0")
    new.ready()
    with connect(new.url) as client:
        assert client.call("add", 1, 2) == 3
