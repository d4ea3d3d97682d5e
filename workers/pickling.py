"""How the calls of a PoolExecutor travel: functions, arguments, results and exceptions, as pickles.

    call:    4 bytes, the length n of the function's pickle | that pickle | pickle of (args, kwargs)
             n = 0: no function before; the pickle is of (function, args, kwargs)
    answer:  a pickle of the result, or "!" and a pickle of (exception, traceback's text)

Plain pickle wherever it can. By dill go functions that it cannot find by name (lambdas, nested ones), and all
that refers to `__main__`, which a worker does not have: it is never run again there, so scripts need no
`if __name__ == "__main__"`. What comes back refers to `__main__` by name, so a result or an exception is of
the class that the program knows.

`dump` and `load` are the only places where bytes of calls and results are made and read.
"""

from __future__ import annotations

import functools
import pickle
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from struct import Struct
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from acomm import handlers
from workers.errors import TooLarge

PROTOCOL = 5

MAX_CALL = 2**31
"""Bytes of a pickled call or result; a message counts lengths in 32 bits."""

_LENGTH = Struct("=I")
_ALONE = _LENGTH.pack(0)
_ERROR = b"!"  # no pickle begins with it
_KEPT = 256  # functions that a worker keeps loaded
_MAX_KEPT = 65536  # bytes of a function's pickle; a larger one carries data, and is not kept
_CONSTANT = (int, float, complex, str, bytes, type(None), ModuleType)


def dump(value: Any) -> bytes:
    """Pickle what goes to a worker. Raises what pickling raises."""
    try:
        data = pickle.dumps(value, PROTOCOL)
    except (pickle.PicklingError, AttributeError):
        with suppress(Exception):  # the plain pickler's word is the clearer one
            return handlers.dump_value(value)
        raise
    return handlers.dump_value(value) if b"__main__" in data else data


load = pickle.loads
"""Unpickle, on either side. dill's pickles name dill themselves."""


# -- the program's side


class Prepared:
    """A function as calls of it travel: `head` is b"" if it goes along with the arguments."""

    __slots__ = ("function", "head", "name")

    def __init__(self, function: Callable[..., Any], name: str, head: bytes) -> None:
        self.function = function
        self.name = name
        self.head = head

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The bytes of a call. Raises what pickling raises, and TooLarge."""
        if self.head:
            data = self.head + dump((args, kwargs))
        else:
            data = _ALONE + dump((self.function, args, kwargs))
        if len(data) > MAX_CALL:
            raise TooLarge(f"the call of {self.name} is {len(data)} bytes pickled; the limit is {MAX_CALL}")
        return data


class Functions:
    """Prepares functions, and remembers what it need not do again. Any thread may use it."""

    def __init__(self) -> None:
        self._last: Prepared | None = None  # only those found by name, which live as long as their module
        self._values: WeakKeyDictionary[FunctionType, tuple[list[Any], Prepared]] = WeakKeyDictionary()

    def prepare(self, function: Callable[..., Any]) -> Prepared:
        """Raises what pickling the function raises."""
        last = self._last
        if last is not None and last.function is function:
            return last
        name = name_of(function)
        if isinstance(function, FunctionType):
            if function.__module__ != "__main__":
                with suppress(pickle.PicklingError, AttributeError):  # it is local
                    return self._by_name(function, name)
            return self._by_value(function, name)
        if _is_found_by_name(function) and not isinstance(function, type):
            return self._by_name(function, name)
        return Prepared(function, name, b"")  # it may have a state, which is of the moment

    def _by_name(self, function: Callable[..., Any], name: str) -> Prepared:
        self._last = prepared = Prepared(function, name, _with_length(pickle.dumps(function, PROTOCOL)))
        return prepared

    def _by_value(self, function: FunctionType, name: str) -> Prepared:
        """Pickled again only if something that it refers to may have changed."""
        parts: list[Any] = []
        constant = _collect(function, parts, set())
        if constant and (known := self._values.get(function)) is not None:
            old, prepared = known
            if len(old) == len(parts) and all(a is b for a, b in zip(old, parts, strict=True)):
                return prepared
        prepared = Prepared(function, name, _with_length(handlers.dump_value(function)))
        if constant and not any(part is function for part in parts):
            # What is remembered must not hold the function: it knows its code, not itself.
            remembered = Prepared(_forgotten, name, prepared.head)
            self._values[function] = parts, remembered
        return prepared


def _forgotten() -> None:
    """In place of a function whose pickle is known."""


def _with_length(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def name_of(function: Callable[..., Any]) -> str:
    """Its qualified name: by it run times are learned, and errors speak of it."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or type(function).__module__}.{name}"


def _collect(function: FunctionType, parts: list[Any], seen: set[int]) -> bool:
    """Put in `parts` what a function's pickle depends on; False if any of it can change unseen."""
    if id(function) in seen:
        return True
    seen.add(id(function))
    parts.append(function.__code__)
    if function.__dict__ or function.__kwdefaults__:
        return False
    values = list(function.__defaults__ or ())
    try:
        values += [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a cell that is still empty
        return False
    values += _named(function.__code__, function.__globals__)
    for value in values:
        if isinstance(value, FunctionType):
            if value.__module__ == "__main__" or "<locals>" in value.__qualname__:
                parts.append(value.__code__)
                if not _collect(value, parts, seen):
                    return False
            else:
                parts.append(value)
        elif type(value) in _CONSTANT or _is_found_by_name(value):
            parts.append(value)
        else:
            return False
    return True


def _is_found_by_name(value: Any) -> bool:
    if isinstance(value, BuiltinFunctionType):
        return isinstance(value.__self__, ModuleType | None)
    return isinstance(value, type) and value.__module__ != "__main__" and "<locals>" not in value.__qualname__


def _named(code: CodeType, names: dict[str, Any]) -> list[Any]:
    found = [names[name] for name in code.co_names if name in names]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _named(constant, names)
    return found


class RemoteTraceback(Exception):
    """The traceback in the worker, as the cause of the exception that came from there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def outcome(answer: bytes) -> tuple[Any, BaseException | None]:
    """The result or the exception that a worker sent; whatever loading it raises is the exception."""
    try:
        if not answer.startswith(_ERROR):
            return load(answer), None
        error, text = load(memoryview(answer)[1:])
        error.__cause__ = RemoteTraceback(text)
        return None, error
    except BaseException as error:
        return None, error


# -- the worker's side


class Loader:
    """Loads calls; functions that it has had before are not loaded again."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Callable[..., Any]] = OrderedDict()

    def call(self, data: bytes) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Raises what unpickling raises."""
        (length,) = _LENGTH.unpack_from(data)
        if not length:
            return load(memoryview(data)[4:])  # type: ignore[no-any-return]
        head = data[4 : 4 + length]
        function = self._known.get(head)
        if function is None:
            function = load(head)
            if length <= _MAX_KEPT:
                self._known[head] = function
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        args, kwargs = load(memoryview(data)[4 + length :])
        return function, args, kwargs


class _MainPickler(pickle.Pickler):
    """Names what is of the program's `__main__`, though it is not to be found in ours."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__ == "__main__":
            return from_main, (obj.__qualname__,)
        return NotImplemented


def from_main(qualname: str) -> Any:
    """The object of that name in `__main__`."""
    return functools.reduce(getattr, qualname.split("."), sys.modules["__main__"])


def _answer(value: Any) -> bytes:
    try:
        return pickle.dumps(value, PROTOCOL)
    except (pickle.PicklingError, AttributeError):
        file = BytesIO()
        _MainPickler(file, PROTOCOL).dump(value)
        return file.getvalue()


def dump_result(value: Any, limit: int) -> bytes:
    """Raises what pickling raises, and TooLarge."""
    data = _answer(value)
    if len(data) > limit:
        raise TooLarge(f"the result is {len(data)} bytes pickled; the limit is {limit}")
    return data


def dump_error(error: BaseException) -> bytes | None:
    """An exception with its traceback; None if it does not survive the journey."""
    try:
        text = "".join(traceback.format_exception(error))
        data = _answer((error, text))
        if b"from_main" not in data:
            load(data)
        return _ERROR + data
    except BaseException:
        return None
