"""How many workers there should be: no process, no clock."""

import math

import pytest

from workers.scaling import IDLE, LOOKS, PATIENCE, Load, Scaler


def looks(scaler: Scaler, load: Load, start: float, seconds: float) -> tuple[float, Load]:
    """Look as often as the pool would, doing what is said, until the number changes or the time is over."""
    now = start
    while now <= start + seconds:
        wanted = scaler.look(now, load)
        if wanted != load.workers:
            return now, load._replace(workers=wanted)
        due = scaler.next_look(load.workers, load.waiting)
        assert due > now
        now = due
    return start + seconds, load


def test_long_waits_by_prediction_bring_as_many_as_are_of_use_at_once() -> None:
    assert Scaler(1, 8).look(0.0, Load(1, 0, 100, PATIENCE * 5)) == 5
    assert Scaler(1, 8).look(0.0, Load(1, 0, 100, 1000.0)) == 8
    assert Scaler(1, 8).look(0.0, Load(1, 0, 2, 1000.0)) == 3  # there is no work for more


def test_short_waits_bring_none() -> None:
    assert Scaler(2, 8).look(0.0, Load(2, 0, 1000, PATIENCE)) == 2


def test_calls_that_have_waited_bring_more_whatever_was_predicted() -> None:
    when, load = looks(Scaler(1, 8), Load(1, 0, 100, 0.0), 0.0, 10.0)
    assert load.workers == 2 and PATIENCE <= when <= 2 * PATIENCE
    scaler, load, now = Scaler(1, 8), Load(1, 0, 100, 0.0), 0.0
    for expected in (2, 4, 8):
        now, load = looks(scaler, load, now, 10.0)
        assert load.workers == expected
    assert looks(scaler, load, now, 10.0)[1].workers == 8
    assert scaler.next_look(8, 100) > now


def test_a_wait_is_counted_anew_when_there_was_none_in_between() -> None:
    scaler, now = Scaler(1, 8), 0.0
    for _ in range(100):
        assert scaler.look(now, Load(1, 0, 1, 0.0)) == 1
        assert scaler.look(now + PATIENCE * 0.9, Load(1, 0, 0, 0.0)) == 1
        now += PATIENCE


def test_none_is_added_while_some_are_spare_or_start() -> None:
    when, load = looks(Scaler(1, 8), Load(2, 1, 100, 1000.0), 0.0, IDLE - 1)
    assert load.workers == 2 and when == IDLE - 1


def test_what_was_spare_for_long_goes_and_not_more() -> None:
    scaler = Scaler(2, 8)
    assert scaler.look(0.0, Load(8, 8, 0, 0.0)) == 8
    assert scaler.look(1.0, Load(8, 3, 0, 0.0)) == 8
    assert scaler.look(2.0, Load(8, 7, 0, 0.0)) == 8
    assert scaler.next_look(8, 0) == 2.0 + IDLE / LOOKS
    assert scaler.look(IDLE, Load(8, 8, 0, 0.0)) == 5
    assert scaler.look(2 * IDLE, Load(5, 5, 0, 0.0)) == 2
    assert scaler.look(9 * IDLE, Load(2, 2, 0, 0.0)) == 2
    assert scaler.next_look(2, 0) == math.inf


@pytest.mark.parametrize("pause", [IDLE / 50, IDLE / 3, IDLE * 0.9])
def test_bursts_do_not_make_it_go_up_and_down(pause: float) -> None:
    scaler, workers, now, changes = Scaler(1, 4), 1, 0.0, 0
    for _ in range(50):
        end = now + pause
        for load in (Load(1, 0, 50, 10.0), Load(1, 0, 0, 0.0)):
            wanted = scaler.look(now, load._replace(workers=workers))
            changes, workers = changes + (wanted != workers), wanted
            now += PATIENCE / 4
        while now < end:
            wanted = scaler.look(now, Load(workers, workers, 0, 0.0))
            changes, workers = changes + (wanted != workers), wanted
            now = scaler.next_look(workers, 0)
    assert (changes, workers) == (1, 4)


def test_what_works_now_and_then_stays() -> None:
    scaler, now = Scaler(1, 4), 0.0
    for turn in range(10 * LOOKS):
        assert scaler.look(now, Load(4, 0 if turn % 5 == 0 else 4, 0, 0.0)) == 4
        now = scaler.next_look(4, 0)
