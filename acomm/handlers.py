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
from functools import cache
from importlib.metadata import version
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
    of `executor` (the loop's own by default). Raises what the handler raises; `SystemExit` and
    `KeyboardInterrupt` come as HandlerError, since in the loop they would end the process.
    """
    try:
        if inspect.iscoroutinefunction(handler):
            await handler(*args)
            return
        outcome = await asyncio.get_running_loop().run_in_executor(executor, _call, handler, args)
        if inspect.isawaitable(outcome):
            await outcome
    except (SystemExit, KeyboardInterrupt) as error:
        raise HandlerError(f"the handler raised {type(error).__name__}({error})") from error


def _call(handler: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return handler(*args)
    except (SystemExit, KeyboardInterrupt) as error:
        # These would end the executor's thread, and the pool would be one short for ever.
        raise HandlerError(f"the handler raised {type(error).__name__}({error})") from error


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@cache
def dill_version() -> str:
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


def _dumps(value: Any) -> bytes:
    import dill

    class Pickler(dill.Pickler):  # type: ignore[misc]
        def save(self, obj: Any, save_persistent_id: bool = True) -> None:
            if isinstance(obj, _UNSENDABLE):
                raise HandlerError(f"a {type(obj).__name__} means nothing in another process")
            super().save(obj, save_persistent_id)

    file = io.BytesIO()
    # recurse: only the globals that the code names travel, so that functions of __main__ find theirs.
    Pickler(file, protocol=5, byref=False, recurse=True).dump(value)
    return file.getvalue()


def _captured(handler: Callable[..., Any]) -> list[tuple[str, Any]]:
    """The variables that a function carries along, by a name that its author knows."""
    try:
        found = inspect.getclosurevars(handler)
    except (TypeError, ValueError):
        return []
    named = [(f"closure variable {name!r}", value) for name, value in found.nonlocals.items()]
    named += [(f"global {name!r}", value) for name, value in found.globals.items()]
    defaults = getattr(handler, "__defaults__", None) or ()
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
