"""The steps that end a worker: in order, each once, never late, never early."""

from __future__ import annotations

import signal

from hypothesis import given
from hypothesis import strategies as st

from workers.ending import Ending, Graces

ALL = [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL]


def steps(ending: Ending, now: float, dumped: bool = False) -> list[signal.Signals]:
    found = []
    while (sig := ending.step(now, lambda: dumped)) is not None:
        found.append(sig)
    return found


def test_a_worker_that_does_nothing() -> None:
    ending = Ending(Graces(dump=0.05, term=0.2), 10.0)
    assert repr(ending) == "<Ending, last sent: nothing>"
    assert steps(ending, 10.0) == [signal.SIGUSR1]
    assert ending.due == 10.05
    assert steps(ending, 10.04) == []
    assert steps(ending, 10.06) == [signal.SIGTERM]
    assert ending.due == 10.26
    assert steps(ending, 10.25) == []
    assert steps(ending, 10.26) == [signal.SIGKILL]
    assert ending.due is None and steps(ending, 99.0) == []
    assert repr(ending) == "<Ending, last sent: SIGKILL>"


def test_a_dump_that_comes_is_not_waited_for() -> None:
    ending = Ending(Graces(dump=0.05, term=0.2), 0.0)
    assert steps(ending, 0.0) == [signal.SIGUSR1]
    assert steps(ending, 0.001, dumped=True) == [signal.SIGTERM]


def test_without_graces_it_is_killed_at_once() -> None:
    assert steps(Ending(Graces(0.0, 0.0), 5.0), 5.0) == ALL


@given(
    st.builds(Graces, st.floats(0, 5), st.floats(0, 5)),
    st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=30),
)
def test_all_is_sent_in_order_and_in_time(graces: Graces, looks: list[tuple[float, bool]]) -> None:
    now = 0.0
    ending = Ending(graces, now)
    sent: list[tuple[signal.Signals, float]] = []
    dumped = False
    for pause, dump in looks:
        now += pause
        dumped |= dump
        late = ending.due is not None and now >= ending.due
        found = steps(ending, now, dumped)
        assert found or not late
        sent += [(sig, now) for sig in found]
        assert ending.due is None or ending.due > now
    assert [sig for sig, _ in sent] == ALL[: len(sent)]
    if len(sent) == 3:
        assert sent[2][1] - sent[1][1] >= graces.term - 1e-6
