"""What workers say, and what is read of the memory that they write."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec

from acomm.errors import WorkerLost
from acomm.messages import Response
from workers.calls import Answer, Call, Failure
from workers.pool import Pool
from workers.scoreboard import SLOT_SIZE, Scoreboard


class _Processes:
    """One worker, and no process."""

    starting = 0

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.killed = False

    def speaker(self, identity: bytes) -> Any:
        return self.worker

    def get(self, token: int) -> Any:
        return self.worker

    def worked(self, worker: Any, answers: int) -> None:
        worker.finished += answers

    def kill(self, worker: Any) -> bool:
        self.killed = True
        return True


class _Worker:
    token = 1
    ready = True
    finished = 0
    stopping = False


class Answers:
    """What a worker gone mad may send: the pool drops it or takes it, and each call ends once at most."""

    def __init__(self) -> None:
        self._pool = Pool(["fuzzing"], workers=1)
        self._now = 0.0

    def samples(self) -> list[bytes]:
        answers = [
            Answer(1, 0.001, b"1"),
            Answer(2, 0.5, None, Failure("task_error", "m", "ValueError", "t", True)),
            Answer(1, 0.1, None, None, "unix:///tmp/s"),
            *(Answer(1, 0.0, None, Failure(code, "")) for code in ("returned", "abandoned", "outgrown")),
        ]
        encode = msgspec.msgpack.encode
        return [encode(answers), *(encode([a, Answer(2, 0.1, b"null")]) for a in answers), encode([])]

    def feed(self, data: bytes, dice: random.Random) -> None:
        pool = Pool(["fuzzing"], workers=1) if dice.random() < 0.01 else self._pool
        self._pool = pool
        processes = _Processes(_Worker())
        pool._processes = processes  # type: ignore[assignment]
        pool.dispatcher = type(pool.dispatcher)()
        dispatcher = pool.dispatcher
        self._now += 1.0
        dispatcher.worker_ready(1, self._now)
        calls = [
            Call("a", b"[]", retries=1),
            Call("a", b"[]", timeout=5.0),
            Call("b", None, deadline=self._now + 9),
        ]
        for call in calls:
            dispatcher.submit(call)
        ended: list[Any] = []
        for _ in range(3):
            list(dispatcher.assign(self._now))
            pool._message(b"w", data, 0, self._now, ended)
            seconds = [dispatcher._predicted.get(task, 0.0) for task in "ab"]
            assert all(math.isfinite(s) for s in seconds), seconds
            self._now += 0.01
        if processes.killed:
            dispatcher.retire(1)
        lost = lambda call: WorkerLost("lost")  # noqa: E731
        ended += dispatcher.worker_lost(1, set(), lost)
        ended += dispatcher.abandon(WorkerLost("no worker"))
        ended += dispatcher.due(self._now + 100, lambda number: None)[0]  # type: ignore[arg-type,return-value]
        ends = [outcome.call.number for outcome in ended if outcome.stream is None]
        assert len(ends) == len(set(ends)), ends
        for outcome in ended:
            if outcome.error is not None:
                Response("x", error=outcome.error).encode(3, extended=True)


class Slots:
    """Garbage in the scoreboard: what is read of it can be told to others, and no time of it is none."""

    def __init__(self) -> None:
        self._board = Scoreboard.create(1, 2)

    def samples(self) -> list[bytes]:
        writer = self._board.writer(0)
        writer.begin(7, 12.5)
        writer.progress(1.0, 2.0, "note é")
        return [bytes(self._board._bytes[:SLOT_SIZE])]

    def feed(self, data: bytes, dice: random.Random) -> None:
        page = (data + bytes(2 * SLOT_SIZE))[: 2 * SLOT_SIZE]
        self._board._bytes[: 2 * SLOT_SIZE] = page
        for slot in [self._board.read(0), *self._board.running(0)]:
            assert all(math.isfinite(value) for value in (slot.started, slot.done, slot.total)), slot
            msgspec.json.encode(slot)
