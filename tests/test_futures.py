"""The executor's Future behaves as the standard library's, whether its Condition exists or not."""

import concurrent.futures as cf
import threading
from collections.abc import Callable
from typing import Any

import pytest

from workers.futures import Future

DEADLINE = 60.0

Make = Callable[[], cf.Future[Any]]


def waited_for() -> Future[Any]:
    future: Future[Any] = Future()
    with pytest.raises(TimeoutError):
        future.result(0)  # makes the condition
    return future


@pytest.fixture(params=[cf.Future, Future, waited_for], ids=["stdlib", "ours", "ours, waited for"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


def test_a_life_with_a_result(make: Make) -> None:
    future = make()
    seen: list[str] = []
    future.add_done_callback(lambda f: seen.append(f"first {f.result()}"))
    assert (future.done(), future.running(), future.cancelled()) == (False, False, False)
    assert future.set_running_or_notify_cancel()
    assert future.running() and not future.cancel()
    future.set_result(7)
    future.add_done_callback(lambda f: seen.append("late"))
    assert (future.done(), future.running(), future.cancelled()) == (True, False, False)
    assert future.result() == 7 and future.exception() is None and seen == ["first 7", "late"]
    assert not future.cancel()
    with pytest.raises(cf.InvalidStateError):
        future.set_result(8)
    with pytest.raises(cf.InvalidStateError):
        future.set_exception(ValueError())
    assert "finished returned int" in repr(future)


def test_a_life_with_an_exception(make: Make) -> None:
    future = make()
    future.set_exception(error := ValueError("no"))
    assert future.exception() is error
    with pytest.raises(ValueError, match="no"):
        future.result()


def test_a_life_that_is_cancelled(make: Make) -> None:
    future = make()
    seen: list[object] = []
    future.add_done_callback(seen.append)
    assert future.cancel() and future.cancel()
    assert seen == [future] and future.cancelled() and future.done()
    assert not future.set_running_or_notify_cancel()
    assert cf.wait([future], 0).done == {future}
    for ask in (future.result, future.exception):
        with pytest.raises(cf.CancelledError):
            ask(0)
    with pytest.raises(cf.InvalidStateError):
        future.set_result(1)


def test_a_callback_that_raises_is_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    future = make()
    seen: list[object] = []
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(seen.append)
    future.set_result(1)
    assert seen == [future] and "exception calling callback" in caplog.text


def test_those_who_wait_are_woken(make: Make) -> None:
    for end in ("set_result", "set_exception", "cancel"):
        for _ in range(200):
            future = make()
            heard: list[bool] = []

            def listen(future: cf.Future[Any] = future, heard: list[bool] = heard) -> None:
                heard.append(bool(cf.wait([future], DEADLINE).done))

            thread = threading.Thread(target=listen)
            thread.start()
            if end == "cancel":
                future.cancel()
                future.set_running_or_notify_cancel()
            else:
                getattr(future, end)(ValueError())
            thread.join()
            assert heard == [True]
