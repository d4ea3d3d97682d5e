"""What the options of `@task` may be: each is checked where the task is decorated, in one line."""

from __future__ import annotations

import dataclasses
import math
import random as random_module
from collections.abc import Callable
from typing import Any, NamedTuple

LEAST_MEMORY = 1_000_000
"""Bytes; Python takes memory from the system in steps of this size."""


class Options(NamedTuple):
    """The options of a task that say how its calls are run. `Task` explains them."""

    timeout: float | None
    soft_timeout: float | None
    priority: int
    concurrency: int | None
    key: tuple[str, ...] | None
    isolated: bool
    max_memory: int | None
    cancel_on_disconnect: bool


@dataclasses.dataclass(frozen=True)
class Retry:
    """When to try a call again: `times` more after it raised one of `on`, `crashes` more after its
    worker died.

    The pause before a further attempt is `backoff` seconds, doubled each time up to `max_backoff`;
    `jitter` spreads it, so that calls which failed together do not come back together.
    """

    times: int
    backoff: float = 0.5
    max_backoff: float = 60
    jitter: bool = True
    on: tuple[type[Exception], ...] = (Exception,)
    crashes: int = 0

    def __post_init__(self) -> None:
        for field in ("times", "crashes"):
            value = getattr(self, field)
            if not is_int(value) or value < 0:
                raise ValueError(f"{field} must be a whole number, 0 or more, not {value!r}")
        for field in ("backoff", "max_backoff"):
            value = getattr(self, field)
            if not is_seconds(value) or value < 0:
                raise ValueError(f"{field} must be seconds, 0 or more, not {value!r}")
        given: Any = self.on
        on = (given,) if isinstance(given, type) else tuple(given)
        if not all(isinstance(cls, type) and issubclass(cls, Exception) for cls in on):
            raise ValueError(f"on must be exception classes, not {self.on!r}")
        object.__setattr__(self, "on", on)

    def delay(self, attempt: int, random: Callable[[], float] = random_module.random) -> float:
        """Seconds to wait after `attempt` failed attempts (1, 2, ...); with jitter, half of the pause
        at least and all of it at most."""
        # Beyond 2**62 any pause is max_backoff, and a larger exponent would overflow the float.
        pause = min(float(self.max_backoff), self.backoff * 2.0 ** min(max(attempt, 1) - 1, 62))
        return pause * (0.5 + 0.5 * random()) if self.jitter else pause


def checked(task: str, given: dict[str, Any], *, streams: bool) -> Options:
    """The options of `task`, of which all are given. Raises ValueError that names task and option."""
    try:
        options = Options(**given)
        if options.key is not None:
            options = options._replace(key=_names(options.key))
        _check(options)
        if streams:
            _check_stream(options)
    except ValueError as error:
        raise ValueError(f"task {task}: {error}") from None
    return options


def _check(options: Options) -> None:
    for name in ("timeout", "soft_timeout"):
        seconds = getattr(options, name)
        if seconds is not None and (not is_seconds(seconds) or seconds <= 0):
            raise ValueError(f"{name} must be seconds above 0, not {seconds!r}")
    soft, hard = options.soft_timeout, options.timeout
    if soft is not None and hard is not None and soft >= hard:
        raise ValueError("soft_timeout must come before timeout, or it never does")
    if not is_int(options.priority):
        raise ValueError(f"priority must be a whole number, not {options.priority!r}")
    if options.concurrency is not None and (not is_int(options.concurrency) or options.concurrency < 1):
        raise ValueError(f"concurrency must be a whole number, 1 or more, not {options.concurrency!r}")
    if options.max_memory is not None and (
        not is_int(options.max_memory) or options.max_memory < LEAST_MEMORY
    ):
        raise ValueError(
            f"max_memory must be bytes, a whole number of {LEAST_MEMORY} or more, not {options.max_memory!r}"
        )
    for name in ("isolated", "cancel_on_disconnect"):
        flag = getattr(options, name)
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, not {flag!r}")


def _check_stream(options: Options) -> None:
    if options.soft_timeout is not None:
        # Half of an item may have been sent: only the end of the stream can tell its reader.
        raise ValueError("soft_timeout is not for tasks that stream; use timeout")
    if options.key is not None:
        raise ValueError("key is not for tasks that stream: a stream has one consumer, so none can join it")


def _names(given: Any) -> tuple[str, ...]:
    """`key=` as it is given, a name or several, as a tuple. Raises ValueError."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"key must be the name of a parameter or several, not {given!r}")
    return tuple(names)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
