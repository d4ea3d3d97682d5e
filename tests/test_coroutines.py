"""Coroutine calls that overlap in a worker of this process: whose is what they see, start and leave."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import msgspec
import pytest
from test_worker import Bench, FakeSocket

from workers.calls import STOP, Answer, Job, cancelling
from workers.forked import Terminated
from workers.options import Retry
from workers.registry import task
from workers.running import context
from workers.scoreboard import Scoreboard
from workers.worker import Worker

encode = msgspec.msgpack.encode
mark: ContextVar[str] = ContextVar("mark", default="")


class WokenSocket(FakeSocket):
    """Its descriptor tells of what comes in, so that an event loop can wait for it."""

    def put(self, message: bytes) -> None:
        self.inbox.append(message)
        os.eventfd_write(self.FD, 1)

    def recv(self, flags: int = 0) -> bytes:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.FD)
        return super().recv(flags)


class WideBench(Bench):
    """With places for four calls that overlap."""

    def __init__(self) -> None:
        self.scoreboard = Scoreboard.create(1, 4)
        self.socket = WokenSocket()
        os.set_blocking(self.socket.FD, False)
        self.numbers = iter(range(1, 1_000_000))
        self.slot = self.scoreboard.writer(0)

    def worker(self, *tasks: Any, **options: Any) -> Worker:
        worker = super().worker(*tasks, **options)
        worker.more_slots = lambda: self.scoreboard.more_writers(0)
        return worker


@pytest.fixture
def bench() -> Iterator[WideBench]:
    bench = WideBench()
    yield bench
    assert bench.scoreboard.running(0) == []
    bench.scoreboard.close()
    os.close(bench.socket.FD)


def by_number(answers: list[Answer]) -> dict[int, Answer]:
    assert len({answer.number for answer in answers}) == len(answers)
    return {answer.number: answer for answer in answers}


def test_as_many_run_at_a_time_as_there_are_places(bench: WideBench) -> None:
    now, most = 0, 0

    @task
    async def count(n: int) -> int:
        nonlocal now, most
        now += 1
        most = max(now, most)
        assert len(bench.scoreboard.running(0)) <= 4
        await asyncio.sleep(0.001)
        now -= 1
        return n

    jobs = [bench.job("count", b"[%d]" % n) for n in range(20)]
    answers = by_number(bench.run(bench.worker(count), jobs[:7], jobs[7:]))
    assert [answers[job.number].result for job in jobs] == [b"%d" % n for n in range(20)]
    assert most == 4
    assert max(map(len, bench.socket.sent)) > 1  # those that end together travel together


def test_each_has_its_own_context_and_variables(bench: WideBench) -> None:
    @task
    async def look(name: str) -> list[str]:
        before = mark.get()
        mark.set(name)
        context().progress(len(name), 10, name)
        await asyncio.sleep(0.001)

        async def inner() -> str:
            return f"{mark.get()} {context().request_id}"

        notes = [slot.note for slot in bench.scoreboard.running(0) if slot.call == own[name]]
        return [before, mark.get(), context().request_id, await asyncio.create_task(inner()), *notes]

    jobs = [bench.job("look", encode_args(f"n{n}"), id=f"id {n}") for n in range(12)]
    own = {f"n{n}": job.number for n, job in enumerate(jobs)}
    answers = by_number(bench.run(bench.worker(look), jobs))
    for n, job in enumerate(jobs):
        result = msgspec.json.decode(answers[job.number].result or b"")
        assert result == ["", f"n{n}", f"id {n}", f"n{n} id {n}", f"n{n}"]


def encode_args(*args: Any) -> bytes:
    return msgspec.json.encode(args)


def test_what_a_call_leaves_ends_with_it_and_not_with_others(bench: WideBench) -> None:
    seen: list[str] = []
    ended = asyncio.Event()

    async def left() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0)
            seen.append("left is cancelled")
            asyncio.create_task(more())  # noqa: RUF006

    async def more() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            seen.append("so is what it started then")

    @task
    async def leave() -> int:
        asyncio.create_task(left())  # noqa: RUF006
        await asyncio.sleep(0)
        return 1

    @task
    async def stay() -> list[str]:
        own = asyncio.create_task(ended.wait())
        while len(seen) < 2:
            await asyncio.sleep(0)
        assert not own.done()
        ended.set()
        await own
        return seen

    stays, leaves = bench.job("stay"), bench.job("leave")
    answers = by_number(bench.run(bench.worker(leave, stay), [stays, leaves]))
    assert answers[leaves.number].result == b"1"
    assert answers[stays.number].result == b'["left is cancelled","so is what it started then"]'


def test_the_loop_is_the_same_for_calls_to_come(bench: WideBench) -> None:
    loops = set()

    @task
    async def which() -> None:
        loops.add(asyncio.get_running_loop())

    worker = bench.worker(which)
    bench.run(worker, *([bench.job("which")] for _ in range(5)))
    assert len(loops) == 1


def test_one_is_cancelled_and_the_others_are_not(bench: WideBench) -> None:
    seen = []

    @task
    async def last() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            seen.append(context().cancelled)

    @task
    async def cancel() -> int:
        bench.socket.put(cancelling([jobs[0].number, 10**9]))
        while not seen:
            await asyncio.sleep(0)
        return 2

    jobs = [bench.job("last"), bench.job("cancel")]
    answers = by_number(bench.run(bench.worker(last, cancel), jobs))
    failure = answers[jobs[0].number].failure
    assert failure and failure.type == "CancelledError" and seen == [True]
    assert answers[jobs[1].number].result == b"2"


def test_a_cancel_that_comes_late_is_ignored(bench: WideBench) -> None:
    @task
    async def short() -> int:
        return 1

    @task
    def plain() -> int:
        return 2

    worker = bench.worker(short, plain)
    bench.socket.inbox += [cancelling([1]), encode([bench.job("short")]), cancelling([1])]
    bench.socket.inbox += [encode([bench.job("plain")]), cancelling([1, 2]), STOP]
    worker.run()
    answers = [answer.result for sent in bench.socket.sent for answer in sent]
    assert answers == [b"1", b"2"]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ValueError, asyncio.CancelledError])
@pytest.mark.parametrize("within", [True, False])
def test_whatever_is_raised_is_that_calls_failure(bench: WideBench, error: Any, within: bool) -> None:
    @task(retry=Retry(1, on=(ValueError,)))
    async def fail() -> None:
        async def inner() -> None:
            raise error("no")

        await asyncio.sleep(0)
        await (asyncio.create_task(inner()) if within else inner())

    @task
    async def work() -> int:
        await asyncio.sleep(0.005)
        return 1

    jobs = [bench.job("work"), bench.job("fail"), bench.job("work")]
    answers = by_number(bench.run(bench.worker(fail, work), jobs))
    failure = answers[jobs[1].number].failure
    assert failure and failure.type == error.__name__ and failure.retriable == (error is ValueError)
    assert "workers/" not in (failure.traceback or "")
    assert [answers[jobs[n].number].result for n in (0, 2)] == [b"1", b"1"]


def test_one_that_cancels_all_tasks_of_the_loop_leaves_none_without_an_answer(bench: WideBench) -> None:
    @task
    async def wreck() -> int:
        for other in asyncio.all_tasks() - {asyncio.current_task()}:
            other.cancel()
        return 1

    @task
    async def victim() -> None:
        await asyncio.sleep(1000)

    jobs = [bench.job("victim"), bench.job("wreck"), bench.job("victim")]
    answers = by_number(bench.run(bench.worker(wreck, victim), jobs))
    assert answers[jobs[1].number].result == b"1"
    for number in (0, 2):  # the second had not begun
        failure = answers[jobs[number].number].failure
        assert failure and failure.type == "CancelledError"


def test_bad_arguments_and_results_are_failures(bench: WideBench) -> None:
    @task
    async def give(what: int) -> Any:
        return "x" * 999 if what else float("nan")

    jobs = [bench.job("give", args) for args in (b"[1]", b"[0]", b'["x"]', b"[]")]
    answers = by_number(bench.run(bench.worker(give), jobs))
    codes = [(found := answers[job.number].failure) and found.code for job in jobs]
    assert codes == ["too_large", "task_error", "bad_args", "bad_args"]


def test_plain_calls_that_come_in_between_wait_for_their_turn(bench: WideBench) -> None:
    order: list[str] = []

    @task
    async def slow() -> None:
        await asyncio.sleep(0.005)
        order.append("slow")

    @task
    def plain() -> None:
        order.append("plain")

    worker = bench.worker(slow, plain)
    names = ["slow", "slow", "plain", "slow"]
    answers = bench.run(worker, [bench.job(name) for name in names])
    assert len(answers) == 4 and order == names


def test_a_copy_that_comes_out_of_a_coroutine_ends(bench: WideBench) -> None:
    """It holds the worker's socket, and is not to answer in its place."""

    @task
    async def fork() -> int:
        copy = os.fork()
        if not copy:
            return 1
        return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])

    (answer,) = bench.run(bench.worker(fork), [bench.job("fork")])
    assert answer.result == b"0"


# -- SIGTERM


@pytest.fixture
def terminated(bench: WideBench) -> Iterator[Callable[..., list[Answer]]]:
    """Runs jobs in a worker that SIGTERM ends; what it has answered."""
    before = signal.getsignal(signal.SIGTERM)

    def run(worker: Worker, *jobs: Job) -> list[Answer]:
        signal.signal(signal.SIGTERM, worker.terminate)
        bench.socket.inbox.append(encode(jobs))
        with pytest.raises(Terminated):
            worker.run()
        return [answer for answers in bench.socket.sent for answer in answers]

    yield run
    signal.signal(signal.SIGTERM, before)
    bench.scoreboard.clear(0)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", ["code", "child", "callback", "waiting"])
def test_sigterm_ends_all_calls_and_the_worker(
    bench: WideBench, terminated: Callable[..., list[Answer]], where: str
) -> None:
    seen: list[str] = []

    async def code() -> None:
        try:
            terminate()
            seen.append("not interrupted")
        except SystemExit as error:
            seen.append(type(error).__name__)
            raise

    @task
    async def end() -> None:
        """Has it sent: while it runs, while a task of it does, between, or while all wait."""
        try:
            if where == "code":
                await code()
            elif where == "child":
                await asyncio.create_task(code())
            elif where == "callback":
                asyncio.get_running_loop().call_soon(terminate)
            else:
                threading.Timer(0.01, terminate).start()
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.001)
            seen.append("end has cleaned up")

    @task
    async def wait() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.001)
            seen.append("wait has cleaned up")

    @task
    async def save() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)
        return "saved"

    @task
    async def turn() -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            raise ValueError("of being cancelled") from None

    @task
    async def never() -> None:
        seen.append("begun all the same")

    jobs = [bench.job(name) for name in ("wait", "save", "turn", "end", "never")]
    (answer,) = terminated(bench.worker(end, wait, save, turn, never), *jobs)
    assert (answer.number, answer.result) == (jobs[1].number, b'"saved"')
    interrupted = ["Terminated"] if where in ("code", "child") else []
    assert sorted(seen) == [*interrupted, "end has cleaned up", "wait has cleaned up"]
    # Those that have no answer are what the worker dies of.
    assert {slot.call for slot in bench.scoreboard.running(0)} == {jobs[n].number for n in (0, 2, 3)}


def test_sigterm_does_not_interrupt_twice(bench: WideBench, terminated: Callable[..., list[Answer]]) -> None:
    @task
    async def stubborn() -> int:
        for _ in range(3):
            with contextlib.suppress(SystemExit, asyncio.CancelledError):
                terminate()
                await asyncio.sleep(0.001)
        return 7

    (answer,) = terminated(bench.worker(stubborn), bench.job("stubborn"))
    assert answer.result == b"7"


# -- beside the options of tasks


def test_those_that_are_about_a_process_run_one_by_one(bench: WideBench) -> None:
    running = most = 0

    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    tasks = [
        task(name="alone", isolated=True)(count),
        task(name="limited", max_memory=10**9)(count),
        task(name="both")(count),
    ]
    jobs = [bench.job(name) for name in ("alone", "limited") for _ in range(4)]
    answers = bench.run(bench.worker(*tasks), jobs)
    assert [answer.failure for answer in answers] == [None] * 8 and most == 1
    bench.run(bench.worker(*tasks), [bench.job("both") for _ in range(4)])
    assert most == 4


def test_a_worker_that_has_grown_says_so_when_answers_have_left(bench: WideBench) -> None:
    @task
    async def short(seconds: float) -> None:
        await asyncio.sleep(seconds)

    worker = bench.worker(short)
    looks = iter([False, True])
    worker._outgrown = lambda: next(looks)
    jobs = [bench.job("short", b"[%g]" % seconds) for seconds in (0, 0.02, 0.04, 0.06)]
    bench.run(worker, jobs)
    said = [[answer.failure and answer.failure.code for answer in sent] for sent in bench.socket.sent]
    assert said == [[None], [None], ["outgrown"], [None], [None]]
