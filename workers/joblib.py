"""PoolExecutor as a backend of joblib, and so of scikit-learn.

    import workers.joblib
    workers.joblib.register()
    with joblib.parallel_config(backend="acomm", n_jobs=2):
        GridSearchCV(...).fit(X, y)

joblib is not installed with this project. What is not about its own backends' memory mapping works:
`return_as="generator"`, `inner_max_num_threads`, nested calls (in threads, as with loky). When a call raises,
those that run are killed and the rest is cancelled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import joblib
from joblib._parallel_backends import AutoBatchingMixin, FallbackToBackend, SequentialBackend
from joblib.parallel import ParallelBackendBase

from workers.executor import PoolExecutor


class PoolBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's batches in `pool`, or in one of its own, which is kept from call to call while `n_jobs`
    and the environment stay the same.
    """

    supports_retrieve_callback = True
    supports_return_generator = True
    supports_inner_max_num_threads = True
    supports_timeout = True

    def __init__(self, pool: PoolExecutor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._given = pool
        self._pool: PoolExecutor | None = None
        self._running: set[Future[Any]] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many run at once. Negative numbers count from all CPUs downwards, as everywhere in joblib."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if self._given is not None:
            return self._given._max_workers
        cpus = len(os.sched_getaffinity(0))
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(cpus + 1 + n_jobs, 1)

    def configure(self, n_jobs: int | None = 1, parallel: Any = None, **_: Any) -> int:
        number = self.effective_n_jobs(n_jobs)
        if number == 1 and self._given is None:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self._pool = self._given or _pool_of(number, self._prepare_worker_env(number))
        return number

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], object] | None = None) -> Future[Any]:
        assert self._pool is not None, "joblib configures first"
        future = self._pool.submit(func)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        for future in list(self._running):
            if self._pool is not None:
                self._pool.kill(future)

    def terminate(self) -> None:
        self._pool = None
        self.reset_batch_stats()


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)


_kept: tuple[int, Mapping[str, str], PoolExecutor] | None = None


def _pool_of(workers: int, environment: Mapping[str, str]) -> PoolExecutor:
    """The pool of the last call if it is such a one; threads of libraries within workers are limited before
    these are imported.
    """
    global _kept
    if _kept is not None:
        if _kept[:2] == (workers, environment) and _kept[2]._driver.state == "open":
            return _kept[2]
        _kept[2].shutdown(wait=False)
    pool = PoolExecutor(workers, initializer=_set_environment, initargs=(environment,))
    _kept = (workers, environment, pool)
    return pool


def shutdown() -> None:
    """End the workers that are kept for the next call; the interpreter's end does it, too."""
    global _kept
    if _kept is not None:
        _kept[2].shutdown()
        _kept = None


def register(name: str = "acomm", *, pool: PoolExecutor | None = None) -> None:
    """Make it known to joblib as `name`. Calls run in `pool`, if given, whatever `n_jobs` they ask for."""
    joblib.register_parallel_backend(name, partial(PoolBackend, pool))
