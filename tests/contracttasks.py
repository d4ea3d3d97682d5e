"""What the contract tests of executors run, in workers of either."""

import os
import time
from pathlib import Path
from typing import Any


def capture(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def double(n: int) -> int:
    return 2 * n


def divide(a: int, b: int) -> float:
    return a / b


def wait_for(path: str) -> str:
    """Until there is a line in the fifo."""
    return Path(path).read_text()


def length(data: bytes) -> int:
    return len(data)


def fail(error: BaseException) -> None:
    raise error


def fail_with_cause() -> None:
    try:
        divide(1, 0)
    except ZeroDivisionError as error:
        problem = LookupError("no such thing")
        problem.add_note("a note")
        raise problem from error


class Falsey(Exception):
    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0


def kill_self() -> None:
    os.kill(os.getpid(), 9)


class Told:
    """Tells in a fifo that it is collected, in a process other than `pid`."""

    def __init__(self, path: str, pid: int) -> None:
        self.path, self.pid = path, pid

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            with open(self.path, "w") as fifo:
                fifo.write("collected\n")


class Plain:
    def method(self) -> str:
        return "done"


STATE: list[Any] = []


def initialize(*values: Any) -> None:
    STATE.extend(values)


def initialized() -> list[Any]:
    return STATE


def fail_to_initialize() -> None:
    raise RuntimeError("no")


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
