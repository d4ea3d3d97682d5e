"""The worker in this process: a socket that is a list, a scoreboard, and tasks that do their worst."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from acomm.egress import Policy
from acomm.errors import ConnectionLost
from acomm.streams import StreamFile
from workers.calls import RETURNED, STOP, Answer, Job, StreamPlace
from workers.options import Retry
from workers.registry import Registry, Task, task
from workers.running import context
from workers.scoreboard import Scoreboard
from workers.worker import Runnable, Worker

answers_of = msgspec.msgpack.Decoder(list[Answer]).decode
encode = msgspec.msgpack.encode


class FakeSocket:
    """A socket with its incoming messages laid in; what is sent is kept."""

    def __init__(self) -> None:
        self.inbox: list[bytes] = []
        self.FD = os.eventfd(0)
        self.sent: list[list[Answer]] = []
        self.changed = threading.Condition()

    def recv(self, flags: int = 0) -> bytes:
        if not self.inbox:
            assert flags == zmq.NOBLOCK, "the worker would wait for ever"
            raise zmq.Again
        return self.inbox.pop(0)

    def send(self, data: bytes) -> None:
        with self.changed:
            self.sent.append(answers_of(data))
            self.changed.notify_all()

    def wait_for(self, count: int) -> bool:
        """Whether that many answers have been sent, sooner or later."""
        with self.changed:
            return self.changed.wait_for(lambda: sum(map(len, self.sent)) >= count, 30)


class Bench:
    """A worker on its bench."""

    def __init__(self) -> None:
        self.scoreboard = Scoreboard.create(1)
        self.socket = FakeSocket()
        self.numbers = iter(range(1, 1_000_000))
        self.slot = self.scoreboard.writer(0)

    def worker(self, *tasks: Task[..., Any], max_result: int = 1000, relieved: bool = False) -> Worker:
        """Unless it is `relieved`, no call is given back, however long a busy machine takes for another."""
        socket: Any = self.socket
        worker = Worker(Registry(tasks), socket, self.slot, max_result, StreamPlace(), Policy())
        if not relieved:
            worker._give_back = lambda: None  # type: ignore[method-assign]
        return worker

    def job(self, name: str, args: bytes | None = None, **options: Any) -> Job:
        return Job(next(self.numbers), name, args, options.pop("id", ""), options.pop("attempt", 1), None)

    def run(self, worker: Worker, *batches: list[Job]) -> list[Answer]:
        self.socket.inbox += [*map(encode, batches), STOP]
        self.socket.sent.clear()
        worker.run()
        assert self.scoreboard.read(0).call == 0
        return [answer for answers in self.socket.sent for answer in answers]

    def one(self, item: Task[..., Any], args: bytes | None = None) -> Answer:
        (answer,) = self.run(self.worker(item), [self.job(item.name, args)])
        return answer


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.scoreboard.close()


# -- results


def test_results_in_order(bench: Bench) -> None:
    @task
    def double(n: int) -> int:
        return 2 * n

    worker = bench.worker(double)
    jobs = [bench.job("double", b"[%d]" % n) for n in range(100)]
    answers = bench.run(worker, jobs[:50], jobs[50:51], jobs[51:])
    assert [(a.number, a.result) for a in answers] == [
        (j.number, b"%d" % (2 * n)) for n, j in enumerate(jobs)
    ]
    assert all(answer.seconds > 0 and answer.failure is None for answer in answers)


def test_a_coroutine_knows_its_own_call_and_leaves_nothing_running(bench: Bench) -> None:
    left: list[asyncio.Task[None]] = []

    @task
    async def who() -> str:
        left.append(asyncio.create_task(asyncio.sleep(1000)))
        await asyncio.sleep(0)
        return context().request_id

    @task
    async def plain() -> str:
        await asyncio.sleep(0)
        return context().request_id

    worker = bench.worker(who, plain)
    jobs = [bench.job(name, id=f"id {n}") for n, name in enumerate(["plain", "plain", "who", "who", "plain"])]
    answers = bench.run(worker, jobs)
    assert [answer.result for answer in answers] == [b'"id %d"' % n for n in range(5)]
    assert len(left) == 2 and all(other.cancelled() for other in left)


def test_progress_that_comes_late_is_not_another_calls(bench: Bench) -> None:
    contexts, seen = [], []

    @task
    def first() -> None:
        contexts.append(context())

    @task
    def second() -> None:
        context().progress(1, 2, "mine")
        contexts[0].progress(3, 4, "late")
        seen.append(bench.scoreboard.read(0)[2:])

    bench.run(bench.worker(first, second), [bench.job("first"), bench.job("second")])
    assert seen == [(1.0, 2.0, "mine")]


def test_a_coroutine_that_exits_does_not_end_the_worker(bench: Bench) -> None:
    @task
    async def leave() -> None:
        raise SystemExit(3)

    @task
    async def stay() -> int:
        return 1

    worker = bench.worker(leave, stay)
    first, second = bench.run(worker, [bench.job("leave"), bench.job("stay")])
    assert first.failure and first.failure.message == "SystemExit: 3"
    assert second.result == b"1"


def test_context(bench: Bench) -> None:
    seen = []

    @task
    def look() -> None:
        here = context()
        here.progress(1, 2, "half-way")
        seen.append((here.request_id, here.attempt, here.deadline, bench.scoreboard.read(0)[2:]))

    worker = bench.worker(look)
    bench.run(worker, [Job(7, "look", None, "an id", 3, 12.5)])
    assert seen == [("an id", 3, 12.5, (1.0, 2.0, "half-way"))]


def test_context_outside_of_a_task() -> None:
    def ask() -> None:
        with pytest.raises(RuntimeError, match="task"):
            context()

    thread = threading.Thread(target=ask)  # a thread begins with no call
    thread.start()
    thread.join()


# -- faults of calls


def test_an_unknown_task(bench: Bench) -> None:
    (answer,) = bench.run(bench.worker(), [bench.job("no_such")])
    assert answer.failure and answer.failure.code == "unknown_task" and "no_such" in answer.failure.message


def test_bad_arguments(bench: Bench) -> None:
    @task
    def double(n: int) -> int:
        return 2 * n

    failure = bench.one(double, b'{"m": 1}').failure
    assert failure and failure.code == "bad_args" and not failure.retriable
    assert failure.message.startswith("task double: unexpected argument m")


def test_too_large_a_result(bench: Bench) -> None:
    @task
    def large() -> str:
        return "x" * 999

    failure = bench.one(large).failure
    assert failure and failure.code == "too_large" and "limit of 1000" in failure.message


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), {1: {2}, "x": object()}, "\ud800", 1j]
)
def test_results_that_json_cannot_express(bench: Bench, value: Any) -> None:
    @task
    def give() -> Any:
        return value

    failure = bench.one(give).failure
    assert failure and failure.code == "task_error" and failure.type == "TypeError"
    assert "JSON" in failure.message or "surrogate" in failure.message


class TwoArguments(Exception):
    """Pickles, and does not unpickle."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class NoText(Exception):
    def __str__(self) -> str:
        raise KeyError("no")


class ExitingText(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class WrongText(Exception):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


class OddText(str):
    def __format__(self, spec: str) -> str:
        raise ValueError("no")

    def __getitem__(self, key: Any) -> str:
        raise ValueError("no")


class Mean(BaseException):
    pass


def chained() -> BaseException:
    error = ValueError("second")
    error.__cause__ = KeyError("first")
    return error


def endless() -> BaseException:
    error = ValueError("again")
    error.__cause__ = error
    return error


@pytest.mark.parametrize(
    ("error", "message", "trace"),
    [
        (ValueError("on purpose"), "ValueError: on purpose", "ValueError: on purpose"),
        (ValueError(), "ValueError", "raise error"),
        (TwoArguments(1, 2), "TwoArguments: 1 and 2", "TwoArguments: 1 and 2"),
        (NoText(), "NoText: <its text cannot be had: KeyError>", ""),
        (ExitingText(), "ExitingText: <its text cannot be had: SystemExit>", ""),
        (WrongText(), "WrongText: <its text cannot be had: TypeError>", ""),
        (ValueError(OddText("x")), "ValueError: x", ""),
        (SystemExit(3), "SystemExit: 3", "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt", "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit", "GeneratorExit"),
        (Mean("it"), "Mean: it", "Mean: it"),
        (
            ExceptionGroup("many", [ValueError("a"), KeyError("b")]),
            "ExceptionGroup: many (2 sub-exceptions)",
            "b",
        ),
        (chained(), "ValueError: second", "KeyError: 'first'"),
        (endless(), "ValueError: again", "ValueError: again"),
        (ValueError("half \ud800 pair"), "ValueError: half ? pair", "half ? pair"),
        (ValueError("x" * 10**6), "ValueError: " + "x" * 2000, "xxx"),
        (RecursionError("deep"), "RecursionError: deep", "deep"),
        (StopIteration(5), "StopIteration: 5", "5"),
    ],
)
def test_exceptions(bench: Bench, error: BaseException, message: str, trace: str) -> None:
    @task
    def fail() -> None:
        raise error

    @task
    def work() -> int:
        return 1

    failed, worked = bench.run(bench.worker(fail, work), [bench.job("fail"), bench.job("work")])
    failure = failed.failure
    assert failure and failed.result is None and worked.result == b"1"
    assert (failure.code, failure.message) == ("task_error", message)
    assert trace in (failure.traceback or "") and len(failure.traceback or "") <= 20_000
    assert "_answer" not in (failure.traceback or "")
    assert str(failure.error()) == message


def test_which_exceptions_are_for_retrying(bench: Bench) -> None:
    @task(retry=Retry(1, on=(OSError,)))
    def fail(timeout: bool) -> None:
        raise TimeoutError if timeout else ValueError

    @task
    def never() -> None:
        raise TimeoutError

    jobs = [bench.job("fail", b"[true]"), bench.job("fail", b"[false]"), bench.job("never")]
    answers = bench.run(bench.worker(fail, never), jobs)
    assert [answer.failure and answer.failure.retriable for answer in answers] == [True, False, False]


# -- when answers are sent


def test_answers_of_tiny_calls_travel_together(bench: Bench) -> None:
    @task
    def tiny() -> None: ...

    worker = bench.worker(tiny)
    # Many, as each one that the machine holds up for some milliseconds goes by itself.
    bench.run(worker, [bench.job("tiny")], [bench.job("tiny") for _ in range(500)])
    assert max(map(len, bench.socket.sent)) > 1


def test_answers_leave_before_a_call_that_may_last(bench: Bench) -> None:
    sent = []

    @task
    def tiny() -> None: ...

    @task
    def look() -> None:
        sent.append(sum(map(len, bench.socket.sent)))

    worker = bench.worker(tiny, look)
    bench.run(worker, [bench.job("tiny")], [bench.job("tiny"), bench.job("look"), bench.job("no_such")])
    assert sent == [2]
    assert [len(answers) for answers in bench.socket.sent] == [1, 1, 1, 1]


def test_a_task_that_lasted_once_is_not_trusted_at_once() -> None:
    @task
    def tiny() -> None: ...

    runnable = Runnable(tiny, lambda: None)
    runnable.learn(0.00001)
    assert runnable.expected == 0.00001
    runnable.learn(10.0)
    runnable.learn(0.00001)
    assert runnable.expected > 0.5


def test_a_call_that_lasts_holds_nothing_back(bench: Bench) -> None:
    """The finished answers leave; what has not begun, and what came later, is given back, the last first."""

    @task
    def tiny(last: bool) -> None:
        # Nothing tells this worker that it will be long; it ends when the others are seen to be free.
        if last:
            bench.socket.inbox.insert(0, encode(later))
            assert bench.socket.wait_for(4)

    worker = bench.worker(tiny, relieved=True)
    later = [bench.job("tiny", b"[false]")]
    jobs = [bench.job("tiny", b"[%s]" % flag) for flag in (b"false", b"true", b"false", b"false")]
    answers = bench.run(worker, jobs)
    returned = [a.number for a in answers if a.failure and a.failure.code == RETURNED]
    assert returned == [later[0].number, jobs[3].number, jobs[2].number]
    assert [a.number for a in answers if a.result] == [jobs[0].number, jobs[1].number]
    assert answers[-1].number == jobs[1].number


def test_stop_that_comes_while_a_call_lasts_is_not_lost(bench: Bench) -> None:
    @task
    def tiny(last: bool) -> None:
        if last:
            assert bench.socket.wait_for(2)

    worker = bench.worker(tiny, relieved=True)
    jobs = [bench.job("tiny", b"[false]"), bench.job("tiny", b"[true]"), bench.job("tiny", b"[false]")]
    answers = bench.run(worker, jobs)  # the inbox holds STOP from the start
    assert [answer.number for answer in answers if answer.result] == [jobs[0].number, jobs[1].number]
    assert not bench.socket.inbox


def test_a_call_begins_in_the_scoreboard_before_it_runs(bench: Bench) -> None:
    seen = []

    @task
    def look() -> None:
        slot = bench.scoreboard.read(0)
        seen.append((slot.call, time.monotonic() >= slot.started > 0))

    jobs = [bench.job("look"), bench.job("look")]
    bench.run(bench.worker(look), jobs)
    assert seen == [(job.number, True) for job in jobs]


# -- streams


class Consumer:
    """Reads, in a thread, the streams that the worker on the bench tells of, until there were `count`."""

    def __init__(self, socket: FakeSocket, count: int) -> None:
        self._socket = socket
        self._count = count
        self._got: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _urls(self) -> list[str]:
        return [answer.stream for sent in self._socket.sent for answer in sent if answer.stream]

    def _read(self) -> None:
        for number in range(self._count):
            with self._socket.changed:
                while len(self._urls()) <= number:
                    assert self._socket.changed.wait(30)
            got = bytearray()
            with contextlib.suppress(ConnectionLost), StreamFile(self._urls()[number]) as file:
                while data := file.read1():
                    got += data
            self._got.append(bytes(got))

    def got(self) -> list[bytes]:
        """What was in each."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self._got


@pytest.fixture
def runtime(folder_for_all: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder_for_all))
    return folder_for_all


def test_a_generator_answers_twice_and_its_neighbours_once(bench: Bench, runtime: Path) -> None:
    @task
    def items(number: int) -> Iterator[str]:
        for n in range(number):
            yield f"{context().request_id} {n}"

    @task
    async def async_items(number: int) -> AsyncIterator[str]:
        for n in range(number):
            await asyncio.sleep(0)
            yield f"{context().request_id} {n}"

    @task
    def plain() -> str:
        return context().request_id

    worker = bench.worker(items, async_items, plain)
    names = [("plain", None), ("items", b"[2]"), ("plain", None), ("async_items", b"[1]"), ("plain", None)]
    jobs = [bench.job(name, args, id=f"id {n}") for n, (name, args) in enumerate(names)]
    consumer = Consumer(bench.socket, 2)
    answers = bench.run(worker, *([job] for job in jobs))
    assert [answer.number for answer in answers] == [1, 2, 2, 3, 4, 4, 5]
    assert [bool(answer.stream) for answer in answers] == [False, True, False, False, True, False, False]
    assert [answer.result for answer in answers] == [
        b'"id 0"', None, None, b'"id 2"', None, None, b'"id 4"'
    ]  # fmt: skip
    assert all(answer.failure is None for answer in answers)
    assert consumer.got() == [b'"id 1 0"\n"id 1 1"\n', b'"id 3 0"\n']


def test_the_traceback_of_a_generator_begins_in_it(bench: Bench, runtime: Path) -> None:
    @task
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    consumer = Consumer(bench.socket, 1)
    started, ended = bench.run(bench.worker(items), [bench.job("items")])
    assert started.stream and ended.failure and ended.failure.traceback
    assert "line" in ended.failure.traceback and "workers/" not in ended.failure.traceback
    assert consumer.got() == [b"1\n"]


def test_a_stream_without_a_socket_is_an_ordinary_failure(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))

    @task
    def items() -> Iterator[int]:
        yield 1

    (answer,) = bench.run(bench.worker(items), [bench.job("items")])
    assert answer.stream is None and answer.failure and answer.failure.type == "ConfigError"


def test_what_a_call_knows_of_its_stream(bench: Bench, tmp_path: Path) -> None:
    kept: list[Any] = []

    @task
    def reads(path: str) -> None:
        kept.append(context())
        kept.append(context().stream.read(2))
        kept.append(context().stream)
        assert not context().cancelled

    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as conn:
                conn.sendall(b"abcd")

        thread = threading.Thread(target=serve)
        thread.start()
        job = bench.job("reads", b'["x"]', id="one")
        job.stream = f"unix://{tmp_path}/s"
        (answer,) = bench.run(bench.worker(reads), [job])
        thread.join()
    assert answer.failure is None and kept[1] == b"ab"
    assert kept[2].closed
    assert repr(kept[0]) == "<Context of reads, request 'one', attempt 1>"
