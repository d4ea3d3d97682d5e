"""How the calls of a PoolExecutor travel: functions, arguments, results and exceptions, as pickles.

    call:    4 bytes, the length n of the function's pickle | that pickle | pickle of (args, kwargs)
             n = 0: no function before; the pickle is of (function, args, kwargs)
    large:   4 bytes 0xFFFFFFFF | 4 bytes, the length of a place | the place, of the last pickle | the rest
    answer:  a pickle of the result, or "@" and the place of one, or "!" and a pickle of (exception,
             traceback's text)

A place is where in shared memory the pickle is with its buffers (`workers.buffers`).

Plain pickle wherever it can. What it cannot find by name (lambdas, nested functions and classes), and all
that refers to `__main__`, which a worker does not have, goes by value: `__main__` is never run again, so
scripts need no `if __name__ == "__main__"`. By cloudpickle first, which is made of the C pickler, pickles
enums, and knows a class again that it has sent before; what it cannot pickle, dill may. What comes back
refers to `__main__` by name, so a result or an exception is of the class that the program knows.

Bytes of calls and results are made and read only here.
"""

from __future__ import annotations

import functools
import pickle
import sys
import traceback
from collections import ChainMap, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from struct import Struct
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from acomm import handlers
from workers import buffers
from workers.buffers import LARGE, LargeBuffer, Pickled, Stored, small
from workers.errors import TooLarge
from workers.segments import Arena, Place, Reader

PROTOCOL = 5

MAX_CALL = 2**31
"""Bytes of a pickled call or result; a message counts lengths in 32 bits."""

_LENGTH = Struct("=I")
_ALONE = _LENGTH.pack(0)
_PLACED = 2**32 - 1
_PLACE = Struct("=II")
_PICKLE, _ERROR, _STORED = 0x80, b"!", b"@"  # how answers begin, a pickle by nature
_KEPT = 256  # functions that a worker keeps loaded
_MAX_KEPT = 65536  # bytes of a function's pickle; a larger one carries data, and is not kept
_CONSTANT = (int, float, complex, str, bytes, type(None), ModuleType)


_UNFIT = (pickle.PicklingError, AttributeError, TypeError)
"""What the plain pickler raises of values that are not for it, or for none."""


def dump(value: Any) -> bytes:
    """Pickle what goes to a worker. Raises what pickling raises."""
    data = None
    try:
        data = pickle.dumps(value, PROTOCOL)
    except TypeError:
        pass  # it may be a memoryview
    except (pickle.PicklingError, AttributeError):
        return _by_value(value).joined()
    if data is None:
        data = buffers.dump(value, beside=False).joined()
    return _by_value(value).joined() if b"__main__" in data else data


def _by_value(value: Any, *, beside: bool = False) -> Pickled:
    try:
        return buffers.dump(value, _by_value_pickler(), beside=beside)
    except (TypeError, AttributeError):
        with suppress(Exception):  # else its word is the clearest one
            return Pickled([handlers.dump_value(value)], [])
        raise


@functools.cache
def _by_value_pickler() -> Any:
    import cloudpickle  # most programs can do without

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table = ChainMap(buffers.REDUCERS, *cloudpickle.Pickler.dispatch_table.maps)  # noqa: RUF012

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, _LruCache) and _is_local(obj):
                return _with_cache, (obj.__wrapped__, obj.cache_parameters())
            return super().reducer_override(obj)

    return Pickler


_LruCache = type(functools.cache(lambda: None))


def _is_local(thing: Any) -> bool:
    return thing.__module__ == "__main__" or "<locals>" in thing.__qualname__


def _with_cache(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def dump_small(value: Any, arena: Arena) -> bytes | Stored:
    """As `dump`, at the least price for a value that is small. One that is not goes to shared memory, if
    there is room.
    """
    try:
        data = pickle.dumps(value, PROTOCOL, buffer_callback=small)
    except (LargeBuffer, *_UNFIT):
        return dump_large(value, arena)
    if b"__main__" in data:
        return dump_large(value, arena)
    return data if len(data) < LARGE else Pickled([data], []).store(arena) or data


def dump_large(value: Any, arena: Arena) -> bytes | Stored:
    """The same, for a value that is large."""
    try:
        pickled = buffers.dump(value)
        if pickled.names_main:
            pickled = _by_value(value, beside=True)
    except TypeError:
        pickled = Pickled([dump(value)], [])
    except (pickle.PicklingError, AttributeError):
        pickled = _by_value(value, beside=True)
    if pickled.is_large and (stored := pickled.store(arena)):
        return stored
    return dump(value) if pickled.buffers else pickled.joined()


load = pickle.loads
"""Unpickle, on either side. Pickles by value name themselves what they need."""


# -- the program's side


class Prepared:
    """A function as calls of it travel: `head` is b"" if it goes along with the arguments. `large` is whether
    those of its last call were: the next ones are, too, for all one knows.
    """

    __slots__ = ("function", "head", "large", "name")

    def __init__(self, function: Callable[..., Any], name: str, head: bytes) -> None:
        self.function = function
        self.name = name
        self.head = head
        self.large = False

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], arena: Arena | None) -> bytes | Stored:
        """The bytes of a call, a Stored's if part of it lies in `arena`. Raises what pickling raises, and
        TooLarge.
        """
        value = (args, kwargs) if self.head else (self.function, args, kwargs)
        if arena is None:
            dumped: bytes | Stored = dump(value)
        elif self.large:
            dumped = dump_large(value, arena)
            self.large = type(dumped) is not bytes
        else:
            dumped = dump_small(value, arena)
        if not isinstance(dumped, bytes):
            self.large = True
            place = dumped.data
            dumped.data = _PLACE.pack(_PLACED, len(place)) + place + (self.head or _ALONE)
            return dumped
        data = (self.head or _ALONE) + dumped
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
        prepared = Prepared(function, name, _with_length(_by_value(function).joined()))
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


def outcome(answer: bytes, find: Callable[[Place], Reader]) -> tuple[Any, BaseException | None]:
    """The result or the exception that a worker sent; whatever loading it raises is the exception. `find`
    has the reader of what workers put in shared memory.
    """
    try:
        if answer[0] == _PICKLE:
            return load(answer), None
        if (place := place_in(answer)) is not None:
            return buffers.load(find(place), place), None
        error, text = load(memoryview(answer)[1:])
        error.__cause__ = RemoteTraceback(text)
        return None, error
    except BaseException as error:
        return None, error


def place_in(answer: bytes) -> Place | None:
    """Where the result is that an answer tells of; None if it has it itself."""
    return buffers.place_of(memoryview(answer)[1:]) if answer.startswith(_STORED) else None


# -- the worker's side


class Loader:
    """Loads calls; functions that it has had before are not loaded again."""

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = reader
        self._known: OrderedDict[bytes, Callable[..., Any]] = OrderedDict()

    def call(self, data: bytes) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Raises what unpickling raises."""
        (length,) = _LENGTH.unpack_from(data)
        if 0 < length < _PLACED:
            function = self._function(data[4 : 4 + length])
            args, kwargs = load(memoryview(data)[4 + length :])
            return function, args, kwargs
        if not length:
            return load(memoryview(data)[4:])  # type: ignore[no-any-return]
        _, length = _PLACE.unpack_from(data)
        place = buffers.place_of(memoryview(data)[8 : 8 + length])
        assert self._reader is not None, "a program that stores has given us what to read from"
        value = buffers.load(self._reader, place)
        head = data[8 + length + 4 :]
        return (self._function(head), *value) if head else value

    def _function(self, head: bytes) -> Callable[..., Any]:
        function = self._known.get(head)
        if function is None:
            function = load(head)
            if len(head) <= _MAX_KEPT:
                self._known[head] = function
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        return function


@functools.cache
def _result_pickler() -> Any:
    """By value, but what the program's `__main__` has by name, though it is not to be found in ours."""

    class Pickler(_by_value_pickler()):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, type | FunctionType | _LruCache):
                if obj.__module__ == "__main__" and "<" not in obj.__qualname__:
                    return from_main, (obj.__qualname__,)
            elif _has_slots_of_main(type(obj)):
                return _with_slots(obj.__reduce_ex__(PROTOCOL))
            return super().reducer_override(obj)

    return Pickler


def _has_slots_of_main(kind: type) -> bool:
    return kind.__module__ == "__main__" and hasattr(kind, "__slots__") and not hasattr(kind, "__setstate__")


def _with_slots(reduced: Any) -> Any:
    """Instances of classes that came by value have a `__dict__` where the program's have slots alone."""
    if not isinstance(reduced, tuple) or len(reduced) < 3:
        return reduced
    values: dict[str, Any] = {}
    for state in reduced[2] if isinstance(reduced[2], tuple) else (reduced[2],):
        values |= state or {}
    return *reduced[:2], (None, values), *reduced[3:]


def from_main(qualname: str) -> Any:
    """The object of that name in `__main__`."""
    return functools.reduce(getattr, qualname.split("."), sys.modules["__main__"])


def _answer(value: Any) -> bytes:
    try:
        return pickle.dumps(value, PROTOCOL)
    except _UNFIT:
        return _pickled(value, beside=False).joined()


def _pickled(value: Any, *, beside: bool) -> Pickled:
    try:
        return buffers.dump(value, beside=beside)
    except (pickle.PicklingError, AttributeError):
        return buffers.dump(value, _result_pickler(), beside=beside)


def dump_result(value: Any, limit: int, arena: Arena | None) -> bytes:
    """The bytes of an answer; those of a large result lie in `arena`, if there is room. Raises what pickling
    raises, and TooLarge.
    """
    if arena is None:
        data = _answer(value)
    else:
        try:
            if type(value) is bytes and len(value) >= LARGE:
                raise LargeBuffer
            data = pickle.dumps(value, PROTOCOL, buffer_callback=small)
            stored = Pickled([data], []).store(arena) if len(data) >= LARGE else None
        except (LargeBuffer, *_UNFIT):
            pickled = _pickled(value, beside=True)
            stored = pickled.store(arena) if pickled.is_large else None
            if stored is None:
                data = _answer(value) if pickled.buffers else pickled.joined()
        if stored is not None:
            arena.lend(stored.segment)
            return _STORED + stored.data
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
        elif isinstance(reduced := error.__reduce_ex__(PROTOCOL), tuple):
            reduced[0](*reduced[1])  # with our copy of its class, as `__main__` has no other here
        return _ERROR + data
    except BaseException:
        return None
