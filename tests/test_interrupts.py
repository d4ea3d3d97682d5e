"""An interrupt that is put off comes when it does no harm, and is not lost."""

import signal
import threading
from collections.abc import Iterator

import pytest

from workers import interrupts
from workers.interrupts import Uninterrupted


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_it_comes_at_the_end() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with Uninterrupted(lambda: steps.append("noticed")):
            signal.raise_signal(signal.SIGINT)
            steps.append("done")
    assert steps == ["noticed", "done"]
    with Uninterrupted():
        pass


def test_what_is_stuck_ends_with_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(interrupts, "PATIENCE", -1.0)
    with pytest.raises(KeyboardInterrupt):
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it went on")


def test_an_exception_within_goes_along() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("lost")
    assert isinstance(caught.value.__context__, ValueError)


def test_other_threads_and_ignored_interrupts_are_left_alone() -> None:
    seen = []

    def look() -> None:
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    look()
    assert seen[1] is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_handler_that_is_set_meanwhile_stays() -> None:
    with Uninterrupted():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
