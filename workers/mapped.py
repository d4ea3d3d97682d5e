"""Items of a `map`, several at a time: how they travel, and what runs them in a worker.

one:     (function's pickle, fresh, arguments)
part:    (function's pickle, fresh, packed items)
packed:  (plain values, None), or (None, pickles of each): see `pack`
answer:  (values or None, pickles of each or None, errors by position, seconds, bytes)
"""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from workers.calls import Failure
from workers.errors import AcommError
from workers.failures import failure_of
from workers.forked import Terminated, end_copy
from workers.pickling import (
    MAX_CALL,
    PROTOCOL,
    RemoteTraceback,
    dump,
    dump_error,
    dump_result,
    load,
    outcome,
)
from workers.segments import Place, Reader

LATE = 0.005
"""Seconds after which a part returns the items that it has not begun: they took longer than foreseen, and
others may be idle."""

_PLAIN = {int, float, complex, bool, str, bytes, type(None)}
"""Types of values that nobody can change, and that do nothing when they are loaded."""

_SIZED = {str, bytes}

mark: Callable[[float], object] = float
"""Notes on the scoreboard which item runs, from 1; set by the worker. 0: none yet; more than there are: all
have run."""


class Answer(NamedTuple):
    """Of the items that have run; an error stands for a value. Errors are as `load_error` takes them. `size`
    is of the values, in bytes, as far as it is known.
    """

    plain: list[Any] | None
    alone: list[bytes | None] | None
    errors: dict[int, bytes | Failure]
    seconds: float
    size: int


def pack(values: list[tuple[Any, ...]]) -> tuple[bytes, dict[int, BaseException]]:
    """The arguments of items in one pickle; those that cannot be pickled are left out, by position.

    Items share nothing: unless all are plain, each is pickled by itself, so that none sees what another has
    done to its arguments.
    """
    if set(map(type, itertools.chain.from_iterable(values))) <= _PLAIN:
        return pickle.dumps((values, None), PROTOCOL), {}
    alone: list[bytes | None] = []
    errors: dict[int, BaseException] = {}
    for position, value in enumerate(values):
        try:
            alone.append(dump(value))
        except (Exception, SystemExit) as error:
            alone.append(None)
            errors[position] = error
    return pickle.dumps((None, alone), PROTOCOL), errors


def run_one(function: bytes, fresh: bool, args: tuple[Any, ...]) -> Answer:
    """In the worker: a single item, whose arguments and value travel as those of any call."""
    begun = time.monotonic()
    pid = os.getpid()
    value, errors = None, {}
    try:
        value = (load(function) if fresh else _function(function))(*args)
        if os.getpid() != pid:
            end_copy(None)
    except BaseException as error:
        _pass_on(error, pid)
        errors[0] = _dump_error(error)
    return Answer([value], None, errors, time.monotonic() - begun, 0)


def run_part(function: bytes, fresh: bool, packed: bytes) -> Answer:
    """In the worker. A function that may have a state is loaded afresh for each item."""
    begun = time.monotonic()
    pid = os.getpid()
    items, alone = load(packed)
    plain = items is not None
    call = _function(function)
    values: list[Any] = []
    errors: dict[int, bytes | Failure] = {}
    for args in items if plain else alone:
        if values and time.monotonic() - begun > LATE:
            break
        mark(len(values) + 1)
        value = None
        try:
            if not plain:
                if args is None:  # it could not be pickled
                    values.append(None)
                    continue
                args = load(args)
            value = (load(function) if fresh else call)(*args)
            if os.getpid() != pid:
                end_copy(None)
        except BaseException as error:  # SystemExit too: an item ends itself, never its worker
            _pass_on(error, pid)
            errors[len(values)] = _dump_error(error)
        values.append(value)
    mark(len(values) + 1)
    kinds = set(map(type, values))
    if kinds <= _PLAIN:
        size = sum(map(len, values)) if kinds and kinds <= _SIZED else 0
        return Answer(values, None, errors, time.monotonic() - begun, size)
    answers: list[bytes | None] = []
    for position, value in enumerate(values):
        try:
            answers.append(dump_result(value, MAX_CALL, None))
        except BaseException as error:
            _pass_on(error, pid)
            answers.append(None)
            errors[position] = _dump_error(error)
    size = sum(len(data) for data in answers if data is not None)
    return Answer(None, answers, errors, time.monotonic() - begun, size)


def _pass_on(error: BaseException, pid: int) -> None:
    """What is not the item's: the end of a copy of the worker, and the end of the worker."""
    if os.getpid() != pid:
        end_copy(error)
    if isinstance(error, Terminated):
        raise error


_known: tuple[bytes, Any] = b"", None


def _function(data: bytes) -> Any:
    global _known
    if _known[0] != data:
        _known = data, load(data)
    return _known[1]


def _dump_error(error: BaseException) -> bytes | Failure:
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # our own frame
    return dump_error(error) or failure_of(error, ())


def load_error(data: bytes | Failure) -> BaseException:
    """In the program: the exception that an item has raised."""
    if isinstance(data, Failure):
        failed: AcommError = data.error()
        if failed.traceback:
            failed.__cause__ = RemoteTraceback(failed.traceback)
        return failed
    error = load_value(data)[1]
    assert error is not None
    return error


def load_value(data: bytes) -> tuple[Any, BaseException | None]:
    """In the program: the value of an item, or its exception."""
    return outcome(data, _not_found)


def _not_found(place: Place) -> Reader:
    raise LookupError(f"values of several items are not in shared memory, and so not at {place}")
