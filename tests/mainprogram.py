"""A program whose functions and classes are its own: what may travel to workers and back. Run by a test.

There is no guard: workers never run it.
"""

import abc
import collections
import dataclasses
import enum
import functools
import logging
import logging.handlers
import re
import typing
from collections.abc import Callable
from typing import Any

from workers import PoolExecutor


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def is_one(self) -> bool:
        return isinstance(self, Point) and super().__repr__().startswith("<")

    @property
    def double(self) -> int:
        return 2 * self.x

    @classmethod
    def make(cls, x: int) -> "Point":
        return cls(x)

    @staticmethod
    def add(x: int) -> int:
        return x + 1


class Point3(Point):
    def is_one(self) -> bool:
        return type(self) is Point3 and super().is_one()


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Mode(enum.IntFlag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass(frozen=True)
class Data:
    a: int
    b: list[int] = dataclasses.field(default_factory=list)


class Named(typing.NamedTuple):
    a: int
    b: str = "x"


Pair = collections.namedtuple("Pair", "a b")


class Base(abc.ABC):
    @abc.abstractmethod
    def value(self) -> int: ...


class Concrete(Base):
    def value(self) -> int:
        return 3


class Slots:
    __slots__ = ("v",)

    def __init__(self, v: int) -> None:
        self.v = v


class Mixed(Slots):
    def __init__(self, v: int, w: int) -> None:
        super().__init__(v)
        self.w = w


class Odd(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.a = a


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")  # of which pickle cannot make it again


def local_class() -> type:
    class Local:
        def __init__(self, v: int) -> None:
            self.v = v

    return Local


Local = local_class()
log = logging.getLogger("mainprogram")
pattern = re.compile("a+")


@functools.cache
def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


@functools.singledispatch
def kind(value: object) -> str:
    return "any"


@kind.register
def _(value: int) -> str:
    return "int"


def plus_one(function: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(function)
    def wrapper(*args: int) -> int:
        return function(*args) + 1

    return wrapper


@plus_one
def decorated(n: int) -> int:
    return n


def even(n: int) -> bool:
    return n == 0 or odd(n - 1)


def odd(n: int) -> bool:
    return n != 0 and even(n - 1)


def uses_modules() -> tuple[int, str]:
    log.info("unheard")
    match = pattern.match("aaa")
    return match.end() if match else 0, logging.handlers.QueueHandler.__name__


def raise_odd() -> None:
    raise Odd(1, 2)


def raise_unpicklable() -> None:
    raise Unpicklable(1, 2)


def same(value: Any) -> Any:
    return value


with PoolExecutor(1) as pool:

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return pool.submit(function, *args).result(60)

    # Classes are the same ones there, in all calls, and here.
    assert run(lambda p: (type(p) is Point, isinstance(p, Point)), Point3(1)) == (False, True)
    assert run(Point(1).is_one) and run(Point3(1).is_one)
    assert run(lambda p: p.double, Point(4)) == 8 and run(Point.add, 1) == 2
    assert type(run(Point.make, 3)) is Point and type(run(same, [Point3(1)])[0]) is Point3
    assert run(same, Color.RED) is Color.RED and run(lambda c: c is Color.BLUE, Color.BLUE)
    assert run(lambda c: {Color.RED: 1}[c], Color.RED) == 1
    for value in (Mode.READ | Mode.WRITE, Data(1, [2]), Named(1), Pair(1, 2), Slots, Point, Color):
        back = run(same, value)
        assert back == value and type(back) is type(value), value
    assert run(same, Slots(5)).v == 5
    mixed = run(same, Mixed(1, 2))
    assert (type(mixed), mixed.v, mixed.w) == (Mixed, 1, 2)
    assert run(Concrete().value) == 3 and type(run(same, Concrete())) is Concrete
    thing = run(same, Local(3))
    assert type(thing) is Local and thing.v == 3
    error = pool.submit(raise_odd).exception(60)
    assert type(error) is Odd and error.a == 1
    error = pool.submit(raise_unpicklable).exception(60)
    assert str(error) == "Unpicklable: 1 and 2" and "in raise_unpicklable" in str(error.__cause__)

    # Functions bring along what they refer to.
    assert run(fibonacci, 50) == 12586269025
    assert (run(kind, 1), run(kind, "")) == ("int", "any")
    assert run(decorated, 1) == 2 and run(functools.partial(decorated), 1) == 2
    assert run(even, 10) and not run(even, 11)
    assert run(uses_modules) == (3, "QueueHandler")
    assert run(lambda: lambda x: x * 3)(2) == 6
    assert run(same, same) is same
    assert list(pool.map(lambda p: Point(p.x + 1).x, map(Point, range(3)))) == [1, 2, 3]

print("done")
