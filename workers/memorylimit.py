"""A task's `max_memory` within its worker: Python itself raises MemoryError in the task, which may clean up.

While a call runs, the kernel refuses the process more writable memory than it had and the call may take
(setrlimit(2), RLIMIT_DATA; it counts what is allocated, touched or not). A subprocess inherits the number.
Code in C that cannot bear a refusal may end the worker, and what several processes take together is not
counted here: the supervisor looks at that, and kills.
"""

from __future__ import annotations

import inspect
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from workers.memory import Statm, megabytes


class _Limit:
    """Limits the memory of this process while it is entered; a MemoryError then says so."""

    __slots__ = ("_before", "_bytes", "_start", "_statm", "_task")

    def __init__(self, task: str, size: int) -> None:
        self._task = task
        self._bytes = size
        self._statm: Statm | None = None

    def __enter__(self) -> None:
        if self._statm is None:
            self._statm = Statm()  # here: a descriptor that was opened before a fork would tell of the parent
        self._start = self._statm.data()
        self._before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = self._start + self._bytes
        known = [limit for limit in (soft, hard, wanted) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # The hard limit may have been lowered by the task; the soft one can go no higher.
        soft, hard = self._before[0], resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard != resource.RLIM_INFINITY:
            soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        if isinstance(error, MemoryError) and self._statm is not None:
            taken = max(0, self._statm.data() - self._start)
            raise MemoryError(
                f"task {self._task} may take {megabytes(self._bytes)} (max_memory), "
                f"and wanted more when it had taken {megabytes(taken)}"
            ) from error


def limited(function: Callable[..., Any], task: str, size: int) -> Callable[..., Any]:
    """`function`, plain, coroutine or generator, within which the process may take `size` bytes more."""
    limit = _Limit(task, size)

    def run(*args: Any, **kwargs: Any) -> Any:
        with limit:
            return function(*args, **kwargs)

    async def run_coroutine(*args: Any, **kwargs: Any) -> Any:
        with limit:
            return await function(*args, **kwargs)

    def run_generator(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with limit:
            yield from function(*args, **kwargs)

    async def run_async_generator(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        with limit:
            async with aclosing(function(*args, **kwargs)) as items:
                async for item in items:
                    yield item

    if inspect.iscoroutinefunction(function):
        return run_coroutine
    if inspect.isasyncgenfunction(function):
        return run_async_generator
    return run_generator if inspect.isgeneratorfunction(function) else run
