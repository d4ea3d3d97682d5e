"""The pools, behind one small interface; each is imported only where it is opened."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

from benchmarks.pools.functions import pid_after

WORKERS = 2

WARM_LIMIT = 30.0
"""Seconds in which both workers of a pool must have answered."""


NOT_INSTALLED = "not installed"


class Cannot(Exception):
    """A contender cannot do what is to be measured; the text is the cell of the table."""


class Pool(Protocol):
    """An open pool. A handle is whatever it returns for a call that is under way."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Any: ...

    def done(self, handle: Any) -> bool: ...

    def result(self, handle: Any, timeout: float | None = None) -> Any:
        """Raises what the call raised, and TimeoutError after `timeout` seconds."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """One call, waited for."""

    def map(self, function: Callable[..., Any], values: Sequence[Any], chunk: int | None = None) -> list[Any]:
        """The results in order; `chunk` values travel together, or as many as is the pool's default."""


@dataclass(frozen=True)
class Contender:
    """`imports`, `make` and `first` are the shortest program: names, the pool as `pool`, a call's result."""

    name: str
    open: Callable[[], AbstractContextManager[Pool]]
    imports: str
    make: str
    first: str
    package: str = ""
    futures: bool = True

    def missing(self) -> str:
        """Why it cannot be measured on this machine, if it cannot."""
        if self.package and find_spec(self.package) is None:
            return NOT_INSTALLED
        return ""

    @property
    def label(self) -> str:
        """Its name, with the version of what does not come with Python or with us."""
        return f"{self.name} {version(self.package)}" if self.package and not self.missing() else self.name


class _Executor:
    """Pools with the futures of `concurrent.futures`."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.submit = executor.submit

    def done(self, handle: Any) -> bool:
        return bool(handle.done())

    def result(self, handle: Any, timeout: float | None = None) -> Any:
        return handle.result(timeout)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.submit(function, *args).result()

    def map(self, function: Callable[..., Any], values: Sequence[Any], chunk: int | None = None) -> list[Any]:
        more = {} if chunk is None else {"chunksize": chunk}
        return list(self._executor.map(function, values, **more))


class _MultiprocessingPool:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.apply_async(function, args)

    def done(self, handle: Any) -> bool:
        return bool(handle.ready())

    def result(self, handle: Any, timeout: float | None = None) -> Any:
        try:
            return handle.get(timeout)
        except multiprocessing.TimeoutError:
            raise TimeoutError from None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.apply(function, args)

    def map(self, function: Callable[..., Any], values: Sequence[Any], chunk: int | None = None) -> list[Any]:
        return list(self._pool.map(function, values, chunksize=chunk))


class _Pebble(_Executor):
    def __init__(self, pool: Any) -> None:
        self._executor = pool

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._executor.schedule(function, args=args)

    def map(self, function: Callable[..., Any], values: Sequence[Any], chunk: int | None = None) -> list[Any]:
        more = {} if chunk is None else {"chunksize": chunk}
        return list(self._executor.map(function, values, **more).result())


class _Mpire(_MultiprocessingPool):
    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.apply(function, args)

    def map(self, function: Callable[..., Any], values: Sequence[Any], chunk: int | None = None) -> list[Any]:
        return list(self._pool.map(function, values, chunk_size=chunk))


class _Joblib:
    def __init__(self, parallel: Any, delayed: Any) -> None:
        self._parallel = parallel
        self._delayed = delayed

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        raise Cannot("has no futures")

    def done(self, handle: Any) -> bool:
        raise Cannot("has no futures")

    def result(self, handle: Any, timeout: float | None = None) -> Any:
        raise Cannot("has no futures")

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        (found,) = self._parallel([self._delayed(function)(*args)])
        return found

    def map(self, function: Callable[..., Any], values: Sequence[Any], chunk: int | None = None) -> list[Any]:
        self._parallel.batch_size = chunk or "auto"
        call = self._delayed(function)
        return list(self._parallel(call(value) for value in values))


@contextmanager
def _ours() -> Iterator[Pool]:
    from workers import PoolExecutor

    with PoolExecutor(WORKERS) as executor:
        yield _Executor(executor)


@contextmanager
def _standard(method: str) -> Iterator[Pool]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context(method)) as executor:
        yield _Executor(executor)


@contextmanager
def _multiprocessing() -> Iterator[Pool]:
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        yield _MultiprocessingPool(pool)


@contextmanager
def _loky() -> Iterator[Pool]:
    import loky  # type: ignore[import-untyped]

    with loky.ProcessPoolExecutor(WORKERS) as executor:
        yield _Executor(executor)


@contextmanager
def _pebble() -> Iterator[Pool]:
    import pebble

    with pebble.ProcessPool(max_workers=WORKERS) as pool:
        yield _Pebble(pool)


@contextmanager
def _mpire() -> Iterator[Pool]:
    from mpire.pool import WorkerPool

    with WorkerPool(n_jobs=WORKERS, keep_alive=True) as pool:
        yield _Mpire(pool)


@contextmanager
def _joblib() -> Iterator[Pool]:
    import joblib

    with joblib.Parallel(n_jobs=WORKERS) as parallel:
        yield _Joblib(parallel, joblib.delayed)


_SUBMIT = "pool.submit(identity, 1).result()"
_STANDARD = "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor"

OURS = "PoolExecutor"
STANDARD = "ProcessPoolExecutor (fork)"
"""What ours is compared with first: the standard library's, as it is by default before Python 3.14."""

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(OURS, _ours, "from workers import PoolExecutor", "PoolExecutor(2)", _SUBMIT),
        Contender(
            STANDARD,
            lambda: _standard("fork"),
            _STANDARD,
            "ProcessPoolExecutor(2, multiprocessing.get_context('fork'))",
            _SUBMIT,
        ),
        Contender(
            "ProcessPoolExecutor (forkserver)",
            lambda: _standard("forkserver"),
            _STANDARD,
            "ProcessPoolExecutor(2, multiprocessing.get_context('forkserver'))",
            _SUBMIT,
        ),
        Contender(
            "multiprocessing.Pool (fork)",
            _multiprocessing,
            "import multiprocessing",
            "multiprocessing.get_context('fork').Pool(2)",
            "pool.apply(identity, (1,))",
        ),
        Contender("loky", _loky, "import loky", "loky.ProcessPoolExecutor(2)", _SUBMIT, "loky"),
        Contender(
            "pebble",
            _pebble,
            "import pebble",
            "pebble.ProcessPool(max_workers=2)",
            "pool.schedule(identity, args=[1]).result()",
            "pebble",
        ),
        Contender(
            "mpire",
            _mpire,
            "import mpire",
            "mpire.WorkerPool(n_jobs=2, keep_alive=True)",
            "pool.apply(identity, (1,))",
            "mpire",
        ),
        Contender(
            "joblib",
            _joblib,
            "import joblib",
            "joblib.Parallel(n_jobs=2)",
            "pool([joblib.delayed(identity)(1)])[0]",
            "joblib",
            futures=False,
        ),
    )
}


def warm(pool: Pool, contender: Contender) -> set[int]:
    """Have both workers make a call; returns their process numbers."""
    pids: set[int] = set()
    end = time.monotonic() + WARM_LIMIT
    pause = 0.01
    while len(pids) < WORKERS:
        if time.monotonic() > end:
            raise Cannot(f"only {len(pids)} of {WORKERS} workers took part")
        if contender.futures:
            handles = [pool.submit(pid_after, pause) for _ in range(WORKERS)]
            pids.update(pool.result(handle, WARM_LIMIT) for handle in handles)
        else:
            pids.update(pool.map(pid_after, [pause] * WORKERS, 1))
        pause = min(2 * pause, 0.5)  # a worker may take longer to start than the other to answer twice
    return pids
