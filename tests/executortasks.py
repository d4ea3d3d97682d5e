"""What the tests of PoolExecutor run; its values and exceptions do their worst on either side."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def square(n: int) -> int:
    return n * n


def echo(value: Any) -> Any:
    return value


def call(functions: list[Callable[[], Any]]) -> Any:
    return functions[0]()


def pid(*_: object) -> int:
    return os.getpid()


def fail(n: int) -> int:
    raise ValueError(n)


class TwoArguments(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def raise_two() -> None:
    raise TwoArguments(1, 2)


def hang(path: str) -> None:
    """Tells that it runs, by a line in a fifo, and does not end."""
    Path(path).write_text("running\n")
    time.sleep(1000)


def hang_with(path: str, _: object) -> None:
    """The same with something in its hands."""
    hang(path)


def spin(n: int) -> int:
    return sum(range(n % 7 * 1000)) * 0 + n


def tell(path: str, line: str) -> None:
    """A line in a fifo, whole: it is shorter than PIPE_BUF."""
    with open(path, "w") as fifo:
        fifo.write(f"{line}\n")


def tell_and_spin(path: str, n: int, steps: int) -> int:
    tell(path, f"{n} {os.getpid()}")
    return sum(range(steps * 20)) * 0 + n


def tell_and_wait(path: str) -> None:
    tell(path, str(os.getpid()))
    time.sleep(1000)


def wait_for_line(path: str) -> str:
    return Path(path).read_text()


def touch(path: str = "default") -> None:
    Path(path).touch()


def pid_and_threads() -> tuple[int, str]:
    return os.getpid(), os.environ["OMP_NUM_THREADS"]


def nested() -> int:
    from workers import PoolExecutor

    with PoolExecutor(1) as pool:
        return pool.submit(square, 2).result()


VALUE: list[object] = []


def initialize(value: object) -> None:
    VALUE.append(value)


def initialized() -> list[object]:
    return VALUE


def broken_initializer() -> None:
    raise RuntimeError("this initializer fails")


def die(how: str) -> None:
    if how == "error":
        raise ZeroDivisionError("as asked")
    if how == "exit":
        sys.exit(3)
    if how == "os_exit":
        os._exit(3)
    ctypes.string_at(0)


def _load_and_die(how: str, parent: int, where: str) -> object:
    if (os.getpid() == parent) == (where == "parent"):
        die(how)
    return Evil(how, "never")


class Evil:
    """Dies when it is pickled, or unpickled in the parent or in another process."""

    def __init__(self, how: str, when: str, parent: int = 0) -> None:
        self.how, self.when, self.parent = how, when, parent

    def __reduce__(self) -> Any:
        if self.when == "pickle":
            die(self.how)
        if self.when == "never":
            return Evil, (self.how, "never")
        return _load_and_die, (self.how, self.parent, self.when)


def make_evil(how: str, when: str, parent: int) -> Evil:
    return Evil(how, when, parent)


class _ThreadOfLoading:
    def __reduce__(self) -> Any:
        return threading.get_ident, ()


def thread_of_loading() -> _ThreadOfLoading:
    """What arrives is the thread that has loaded it."""
    return _ThreadOfLoading()


def append_and_count(values: list[int], more: object = None) -> int:
    values.append(0)
    return len(values)


class Counter:
    def __init__(self) -> None:
        self.number = 0

    def count(self, _: object) -> int:
        self.number += 1
        return self.number


def fail_at(n: int, bad: int) -> int:
    if n == bad:
        raise ValueError(n)
    return n


def raise_two_at(n: int) -> int:
    if n == 700:
        raise TwoArguments(1, 2)
    return n


def evil_at(n: int, bad: int, when: str, parent: int) -> object:
    return Evil("error", when, parent) if n == bad else [n]


def die_at(n: int, bad: int, path: str) -> int:
    if n == bad:
        os.kill(os.getpid(), 9)
    return n


def nap(n: int) -> int:
    time.sleep(0.001)
    return n


def touch_at(n: int, which: int, path: str, fifo: str) -> int:
    if n == 1:
        Path(fifo).read_text()
    if n == which:
        Path(path).touch()
    return n


def meet(n: int, path: str) -> int:
    """The item 1500 waits for the item 2999."""
    if n == 1500:
        Path(path).read_text()
    elif n == 2999:
        Path(path).write_text("met")
    return n
