"""Handlers: how they are run, and how they travel. The only importer of dill.

A handler is called as `handler(request, response)`. One that travels is pickled where it is submitted
and unpickled in the supervisor. Unpickling runs whatever the pickle says, so it is for the caller of
`load` to know that the sender may run code here (the same uid, over the unix socket).

Code objects of another Python X.Y crash the interpreter when they are called, so the versions
travel along and a mismatch is refused before anything is unpickled.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from functools import cache, partial
from types import FunctionType
from typing import Any

from acomm.errors import HandlerError

MAX_PICKLE = 1024 * 1024
"""Bytes. Handlers are code and a few values; a larger one has caught data that it should not carry."""

# dill pickles these without complaint, but what arrives is another lock, or a file opened again.
_UNSENDABLE = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    threading.Thread,
    io.IOBase,
    socket.socket,
    asyncio.AbstractEventLoop,
    asyncio.Future,
)


async def run(handler: Callable[..., Any], *args: Any, executor: Executor | None = None) -> None:
    """Call a handler where it may block: a coroutine function on the event loop, any other in a thread
    of `executor` (the loop's own by default). Raises what the handler raises, as far as it is an
    Exception; anything else comes as HandlerError, since `SystemExit` would end the process, and
    `CancelledError` and `StopIteration` have meanings of their own to the event loop.
    """
    try:
        if inspect.iscoroutinefunction(handler):
            await handler(*args)
            return
        outcome = await asyncio.get_running_loop().run_in_executor(executor, _call, handler, args)
        if inspect.isawaitable(outcome):
            await outcome
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # meant for us
        raise _outlandish(error) from error
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        raise _outlandish(error) from error


def _call(handler: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return handler(*args)
    except BaseException as error:
        # A future refuses StopIteration, and whoever waits for it would wait for ever.
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise _outlandish(error) from error


def _outlandish(error: BaseException) -> HandlerError:
    return HandlerError(f"the handler raised {type(error).__name__}({error})")


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@cache
def dill_version() -> str:
    from importlib.metadata import version

    return version("dill")


def check_versions(python: str, dill: str) -> None:
    """Refuse handlers pickled by another Python X.Y or dill X.Y. Raises HandlerError."""
    if python != python_version():
        raise HandlerError(
            f"handlers were pickled by Python {python or '(unknown)'}, this is {python_version()}: "
            "run client and supervisor on the same X.Y"
        )
    if dill.split(".")[:2] != dill_version().split(".")[:2]:
        raise HandlerError(
            f"handlers were pickled by dill {dill or '(unknown)'}, this is {dill_version()}: "
            "install the same X.Y on both sides"
        )


def dump(handler: Callable[..., Any]) -> str:
    """Pickle `handler`, as base64 text. Raises HandlerError that names the object in the way."""
    if not callable(handler):
        raise HandlerError(f"a handler must be callable, not {type(handler).__name__}")
    try:
        data = _dumps(handler)
    except Exception as error:
        raise HandlerError(
            f"handler {_name(handler)} cannot be pickled: {_culprit(handler, error)}"
        ) from error
    if len(data) > MAX_PICKLE:
        raise HandlerError(
            f"handler {_name(handler)} is {len(data)} bytes pickled, over the limit of {MAX_PICKLE}: "
            f"it carries {_largest(handler)}; keep data in an importable module instead"
        )
    return base64.b64encode(data).decode("ascii")


def load(text: str) -> Callable[..., Any]:
    """Unpickle what `dump` made: this runs code of the sender. Raises HandlerError."""
    import dill

    try:
        handler = dill.loads(base64.b64decode(text, validate=True))
    except Exception as error:
        raise HandlerError(f"a handler cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(handler):
        raise HandlerError(f"a handler must be callable, not {type(handler).__name__}")
    return handler  # type: ignore[no-any-return]


def dump_value(value: Any) -> bytes:
    """Pickle anything that refers to functions which cannot be found by name. `pickle.loads` loads it, which
    runs code of the sender. Raises what is in the way: HandlerError or an error of pickling.
    """
    return _dumps(value)


def _dumps(value: Any) -> bytes:
    import dill

    class Pickler(dill.Pickler):  # type: ignore[misc]
        def save(self, obj: Any, save_persistent_id: bool = True) -> None:
            if isinstance(obj, _UNSENDABLE) and not isinstance(obj, io.BytesIO | io.StringIO):
                raise HandlerError(f"a {type(obj).__name__} means nothing in another process")
            if isinstance(obj, FunctionType):
                # The globals of code from an importable module are that module's, there as here; they are
                # shared, not copied. Those of __main__ travel along, but only the ones that are named.
                self._recurse = not _in_importable_module(obj)
            super().save(obj, save_persistent_id)

    file = io.BytesIO()
    Pickler(file, protocol=5, byref=False, recurse=True).dump(value)
    return file.getvalue()


def _in_importable_module(function: FunctionType) -> bool:
    module = sys.modules.get(function.__module__ or "")
    return function.__module__ != "__main__" and vars(module or object) is function.__globals__


def _captured(handler: Callable[..., Any]) -> list[tuple[str, Any]]:
    """The variables that a function carries along, by a name that its author knows."""
    if isinstance(handler, partial):
        values = [*handler.args, *handler.keywords.values()]
        return _captured(handler.func) + [(f"partial argument {value!r}", value) for value in values]
    try:
        found = inspect.getclosurevars(handler)
    except (TypeError, ValueError):
        return []
    named = [(f"closure variable {name!r}", value) for name, value in found.nonlocals.items()]
    function = getattr(handler, "__func__", handler)
    if isinstance(function, FunctionType) and not _in_importable_module(function):
        named += [(f"global {name!r}", value) for name, value in found.globals.items()]
    defaults = getattr(handler, "__defaults__", None) or ()
    if (owner := getattr(handler, "__self__", None)) is not None:
        named.append(("the object that it is a method of", owner))
    return named + [(f"default value {value!r}", value) for value in defaults]


def _culprit(handler: Callable[..., Any], error: Exception) -> str:
    for name, value in _captured(handler):
        try:
            _dumps(value)
        except Exception as why:
            return f"{name} is a {type(value).__name__}: {why}"
    return str(error)


def _largest(handler: Callable[..., Any]) -> str:
    sizes = [(len(_dumps(value)), name) for name, value in _captured(handler)]
    return "{1} ({0} bytes)".format(*max(sizes)) if sizes else "too much"


def _name(handler: Callable[..., Any]) -> str:
    return str(getattr(handler, "__qualname__", type(handler).__name__))
