"""joblib's calls in a PoolExecutor."""

import os
import time
from collections.abc import Iterator

import executortasks as tasks
import joblib
import pytest
from joblib import Parallel, delayed
from leftovers import state

import workers.joblib
from workers import PoolExecutor
from workers.joblib import PoolBackend

pytestmark = pytest.mark.process


@pytest.fixture
def pool() -> Iterator[PoolExecutor]:
    before = state()
    with PoolExecutor(2) as pool:
        yield pool
    assert state() == before


def test_calls_in_a_given_pool(pool: PoolExecutor) -> None:
    with joblib.parallel_config(backend=PoolBackend(pool)):
        squares = [n * n for n in range(2000)]
        assert Parallel()(delayed(tasks.square)(n) for n in range(2000)) == squares
        generator = Parallel(return_as="generator")(delayed(tasks.square)(n) for n in range(20))
        assert list(generator) == squares[:20]
        unordered = Parallel(return_as="generator_unordered")(delayed(tasks.square)(n) for n in range(20))
        assert sorted(unordered) == squares[:20]
        assert Parallel()(delayed(lambda n: n + 1)(n) for n in range(3)) == [1, 2, 3]
    assert pool.submit(tasks.square, 3).result() == 9


def test_an_error_ends_the_calls_that_run(pool: PoolExecutor) -> None:
    begun = time.monotonic()
    with joblib.parallel_config(backend=PoolBackend(pool)):
        with pytest.raises(ValueError):
            Parallel(pre_dispatch="all")(
                delayed(function)(argument)
                for function, argument in [(time.sleep, 1000), (tasks.fail, 3), (time.sleep, 1000)]
            )
        assert Parallel()(delayed(tasks.square)(n) for n in range(3)) == [0, 1, 4]
    assert time.monotonic() - begun < 500


def test_a_pool_of_its_own_is_kept_and_limits_threads() -> None:
    workers.joblib.register("test-acomm")
    pids = []
    for threads in (None, None, 7):
        config = joblib.parallel_config("test-acomm", n_jobs=2, inner_max_num_threads=threads)
        with config:
            found = Parallel()(delayed(tasks.pid_and_threads)() for _ in range(20))
        pids.append({pid for pid, _ in found})
        assert {limit for _, limit in found} == {str(threads or max(1, (os.cpu_count() or 1) // 2))}
    assert len(pids[0] | pids[1]) <= 2
    assert not pids[1] & pids[2]
    workers.joblib.shutdown()


def test_no_jobs_are_an_error() -> None:
    with pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0, backend=PoolBackend())(delayed(tasks.square)(n) for n in range(3))
    assert Parallel(n_jobs=1, backend=PoolBackend())(delayed(tasks.square)(n) for n in range(3)) == [0, 1, 4]
