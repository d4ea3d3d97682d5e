"""Plain clients that hold supervisors to their promise: what is acknowledged has one outcome."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from queue import Empty
from types import TracebackType
from typing import Any, Self

from peers import WAIT, connected, frame, read_frame
from serving import Hook, request

NOT_NOW = ("shutting_down", "busy")
_PAUSE = 0.01  # seconds until a request is sent again that nobody has acknowledged
_LAST = 0.2  # seconds for a second answer of the same id, which may be under way at the end


class Promised:
    """Clients at the socket `path` that never stop having the task `noted` run, until `check`. Each sends a
    request again, under its id, until that is acknowledged, and then waits for the answer at its hook.

    `acknowledged` are the values whose requests were; `made` those whose answers have come.
    """

    def __init__(self, path: str, folder: Path, *, clients: int = 4) -> None:
        self.acknowledged: set[int] = set()
        self.made: list[int] = []
        self.faults: list[BaseException] = []
        self.answers: dict[str, list[Any]] = defaultdict(list)
        self.runs = folder / "runs"
        self._path = path
        self._clients = clients
        self._stop = threading.Event()
        self._told = threading.Condition()
        self._ended: set[int] = set()
        self._stack = ExitStack()
        self._hooks = [self._stack.enter_context(Hook(folder / f"hook{n}")) for n in range(clients)]
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._join()
        self._stack.close()

    def _run(self, value: int) -> None:
        hook = self._hooks[value]
        try:
            while not self._stop.is_set():
                id = f"r{value}"
                self._send(request(id, "noted", hook.url, [str(self.runs), value], acomm=1))
                self.acknowledged.add(value)
                while not self.answers[id]:
                    self._hear(hook, WAIT)
                with self._told:
                    self.made.append(value)
                    self._told.notify_all()
                value += self._clients
            self._hear(hook, _LAST)
        except Empty:
            if not self._stop.is_set():
                self._fail(AssertionError(f"the request r{value} was acknowledged and never answered"))
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._told:
            self.faults.append(error)
            self._told.notify_all()

    def _send(self, message: bytes) -> None:
        refusal: object = "nobody was there"
        pause = threading.Event()
        for _ in range(int(WAIT / _PAUSE)):
            try:
                with connected(self._path) as sock:
                    sock.sendall(frame(message))
                    ack = json.loads(read_frame(sock))
                if not ack["error"]:
                    return
                refusal = ack
                assert ack["error_info"]["code"] in NOT_NOW, ack
            except (OSError, EOFError):
                pass
            pause.wait(_PAUSE)
        raise AssertionError(f"never acknowledged: {refusal}")

    def _hear(self, hook: Hook, seconds: float) -> None:
        answer = json.loads(hook.received.get(timeout=seconds)[4:])
        with self._told:
            self.answers[answer["id"]].append((answer["result"], answer["error"]))

    def until_over(self, process: subprocess.Popen[bytes]) -> None:
        """Have `more` know of the end of a supervisor."""

        def wait() -> None:
            process.wait()
            with self._told:
                self._ended.add(process.pid)
                self._told.notify_all()

        thread = threading.Thread(target=wait)
        self._threads.append(thread)
        thread.start()

    def more(self, count: int, *, unless_over: subprocess.Popen[bytes] | None = None) -> bool:
        """Wait for so many answers more. False if a supervisor has ended before, which `until_over` knows."""
        with self._told:
            goal = len(self.made) + count

            def enough() -> bool:
                over = unless_over is not None and unless_over.pid in self._ended
                return len(self.made) >= goal or bool(self.faults) or over

            assert self._told.wait_for(enough, 2 * WAIT), "stuck"
            assert not self.faults, self.faults
            return len(self.made) >= goal

    def _join(self) -> None:
        self._stop.set()
        for thread in self._threads[: self._clients]:
            if thread.is_alive():
                thread.join(2 * WAIT)

    def check(self, deaths: int) -> None:
        """Nothing that was acknowledged is without an answer, and none has two; nothing runs twice that no
        death explains: at each, so many may have been under way as there are clients.
        """
        self._join()
        assert not self.faults, self.faults
        assert self.acknowledged == set(self.made)
        for value in self.made:
            assert set(self._of(value)) == {(value, "")}, value
        runs = Counter(int(line.split()[1]) for line in self.runs.read_text().splitlines())
        assert set(runs) == set(self.made)
        assert runs.total() - len(runs) <= deaths * self._clients

    def _of(self, value: int) -> list[Any]:
        return self.answers[f"r{value}"]
