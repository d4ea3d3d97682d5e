"""Handlers: run where they may block, and pickled so that another process can run them."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acomm import handlers
from acomm.errors import HandlerError

log = logging.getLogger("test.handlers")
shared_lock = threading.Lock()


def run_elsewhere(text: str, *args: Any) -> str:
    """Load a handler in a fresh interpreter, which has imported nothing; what it prints."""
    code = (
        "import sys, json\n"
        "from acomm import handlers\n"
        "text, args = json.load(sys.stdin)\n"
        "outcome = handlers.load(text)(*args)\n"
        "if hasattr(outcome, '__await__'):\n"
        "    import asyncio; outcome = asyncio.run(outcome)\n"
        "print(repr(outcome))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([text, args]),
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def add_offset(offset: int) -> Callable[[int], int]:
    return lambda number: number + offset


# -- travelling -------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_closure_runs_in_a_fresh_process() -> None:
    names = ["a", "b"]

    def handler(number: int) -> list[str]:
        log.info("a logger is no obstacle")
        return [name * number for name in names]

    assert run_elsewhere(handlers.dump(handler), 2) == "['aa', 'bb']"
    assert run_elsewhere(handlers.dump(add_offset(5)), 2) == "7"


@pytest.mark.process
def test_coroutine_functions_partials_and_methods_run_in_a_fresh_process() -> None:
    async def later(number: int) -> int:
        await asyncio.sleep(0)
        return number + 1

    assert run_elsewhere(handlers.dump(later), 1) == "2"
    assert run_elsewhere(handlers.dump(functools.partial(pow, 2)), 5) == "32"
    assert run_elsewhere(handlers.dump([1, 2].count), 2) == "1"
    assert run_elsewhere(handlers.dump(Path("/x").joinpath), "y") == "PosixPath('/x/y')"


@pytest.mark.process
def test_a_handler_of_main_finds_its_globals_in_a_fresh_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from acomm import handlers\n"
        "FACTOR = 3\n"
        "UNUSED = open('/dev/null')\n"
        "def helper(n): return n * FACTOR\n"
        "def handler(n): return helper(n) + 1\n"
        "print(handlers.dump(handler))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert run_elsewhere(done.stdout.strip(), 2) == "7"


def generator() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (threading.Lock, "lock"),
        (threading.RLock, "RLock"),
        (threading.Event, "Event"),
        (lambda: socket.socket(), "socket"),
        (generator, "generator"),
        (lambda: open("/dev/null"), "TextIOWrapper"),  # noqa: SIM115
        (lambda: open("/dev/null", "rb"), "BufferedReader"),  # noqa: SIM115
        (asyncio.new_event_loop, "EventLoop"),
    ],
)
def test_what_cannot_travel_is_named(make: Callable[[], Any], name: str) -> None:
    obstacle = make()
    try:

        def handler(request: Any, response: Any) -> Any:
            return [obstacle, request]

        with pytest.raises(HandlerError) as caught:
            handlers.dump(handler)
        assert "handler test_what_cannot_travel_is_named.<locals>.handler cannot be pickled" in str(
            caught.value
        )
        assert f"closure variable 'obstacle' is a {type(obstacle).__name__}: " in str(caught.value)
        assert name in str(caught.value)
    finally:
        if hasattr(obstacle, "close"):
            obstacle.close()


class Service:
    def __init__(self) -> None:
        self.guard = threading.Lock()

    def handle(self, request: Any, response: Any) -> None: ...


def uses_global(request: Any, response: Any) -> None:
    with shared_lock:
        pass


def test_the_obstacle_is_named_wherever_it_hides() -> None:
    lock = threading.Lock()
    script = {"__name__": "__main__", "shared_lock": lock}
    exec("def handler(request, response):\n    shared_lock.acquire()", script)  # noqa: S102
    with pytest.raises(HandlerError, match="global 'shared_lock' is a lock"):
        handlers.dump(script["handler"])  # type: ignore[arg-type]
    with pytest.raises(HandlerError, match="default value <unlocked"):
        handlers.dump(lambda request, response, guard=lock: None)
    with pytest.raises(HandlerError, match="partial argument <unlocked"):
        handlers.dump(functools.partial(uses_nothing, lock))
    with pytest.raises(HandlerError, match="the object that it is a method of is a Service"):
        handlers.dump(Service().handle)


def test_globals_of_an_importable_module_stay_there() -> None:
    obstacle = threading.Lock()
    handlers.dump(uses_global)
    handlers.dump(lambda: uses_global)
    handlers.dump(lambda: shared_lock)
    with pytest.raises(HandlerError, match="closure variable 'obstacle' is a lock"):
        handlers.dump(lambda: (shared_lock, obstacle))
    with pytest.raises(HandlerError, match="default value <unlocked"):  # the global is not to blame
        handlers.dump(lambda guard=obstacle: shared_lock)


def uses_nothing(*args: Any) -> None: ...


def test_memory_files_are_values_and_travel() -> None:
    buffer = io.BytesIO(b"abc")
    assert handlers.load(handlers.dump(lambda: buffer.getvalue()))() == b"abc"


def test_a_handler_that_carries_much_names_what() -> None:
    small, table = "x", b"y" * 1_100_000
    with pytest.raises(
        HandlerError, match=r"over the limit of 1048576.*closure variable 'table' \(11\d+ bytes"
    ):
        handlers.dump(lambda: (small, table))


@pytest.mark.parametrize("thing", [None, 5, "name"])
def test_only_what_can_be_called_is_a_handler(thing: Any) -> None:
    with pytest.raises(HandlerError, match="must be callable"):
        handlers.dump(thing)
    with pytest.raises(HandlerError, match="must be callable"):
        handlers.load(base64.b64encode(pickle.dumps(thing)).decode())


@pytest.mark.parametrize("text", ["", "not base64!", "AAAA", base64.b64encode(b"cos\nno_such\n.").decode()])
def test_what_cannot_be_loaded_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(HandlerError, match="cannot be loaded"):
        handlers.load(text)


def test_versions_are_checked() -> None:
    python, dill = handlers.python_version(), handlers.dill_version()
    handlers.check_versions(python, dill)
    major, minor = dill.split(".")[:2]
    handlers.check_versions(python, f"{major}.{minor}.999")
    for other in ("2.7", "", "3"):
        with pytest.raises(HandlerError, match=f"this is {python}: run client and supervisor"):
            handlers.check_versions(other, dill)
    for other in (f"{major}.{int(minor) + 1}.0", "", "x"):
        with pytest.raises(HandlerError, match="install the same"):
            handlers.check_versions(python, other)


# -- running ----------------------------------------------------------------------------------------


async def test_a_plain_function_runs_in_a_thread() -> None:
    seen: list[Any] = []
    await handlers.run(lambda *args: seen.extend([threading.current_thread(), *args]), 1, 2)
    assert seen[1:] == [1, 2]
    assert seen[0] is not threading.current_thread()


async def test_coroutine_functions_and_what_returns_them_run_on_the_loop() -> None:
    seen: list[Any] = []

    async def handler(value: Any) -> None:
        seen.append((threading.current_thread(), value))

    await handlers.run(handler, 1)
    await handlers.run(functools.partial(handler, 2))
    await handlers.run(lambda: handler(3))
    assert seen == [(threading.current_thread(), value) for value in (1, 2, 3)]


@pytest.mark.parametrize("raised", [ValueError("x"), KeyError("k"), OSError(5, "io"), HandlerError("h")])
async def test_a_handlers_exception_is_the_callers(raised: Exception) -> None:
    def handler() -> None:
        raise raised

    async def coroutine() -> None:
        raise raised

    for candidate in (handler, coroutine):
        with pytest.raises(type(raised)) as caught:
            await handlers.run(candidate)
        assert caught.value is raised


@pytest.mark.parametrize(
    "raised",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), StopIteration(1)],
)
async def test_what_would_end_a_thread_or_a_loop_is_turned_into_an_error(raised: BaseException) -> None:
    def handler() -> None:
        raise raised

    async def coroutine() -> None:
        raise raised

    async with asyncio.timeout(10):
        with pytest.raises(HandlerError, match=type(raised).__name__):
            await handlers.run(handler)
        with pytest.raises((HandlerError, RuntimeError)):  # Python itself turns StopIteration into the latter
            await handlers.run(coroutine)
        await handlers.run(lambda: None)  # the threads are all there still


async def test_a_cancelled_run_is_cancelled() -> None:
    begun = asyncio.Event()

    async def handler() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(handlers.run(handler))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
