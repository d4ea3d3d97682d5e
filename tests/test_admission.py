"""Admission: what is under way is bounded, shared, and who is turned away is told the truth."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from workers.admission import LONGEST, MARGIN, SHORTEST, UNKNOWN, Account, Admission
from workers.errors import Busy, TooLarge
from workers.forecast import ENDS, LOOK, WINDOW, Forecast
from workers.promises import LATE, MOST, Promise, Promises

_ids = itertools.count()


def nothing() -> float | None:
    return None


def take(admission: Admission, caller: str, size: int = 1, count: int = 1) -> Account:
    account = admission.account(caller)
    for _ in range(count):
        admission.check(account, size, 0.0, nothing)
        admission.take(account, size)
    return account


def refusal(admission: Admission, caller: str, size: int = 1, now: float = 0.0, gap: float = 1.0) -> Busy:
    with pytest.raises(Busy) as caught:
        admission.check(admission.account(caller), size, now, lambda: gap, str(next(_ids)))
    return caught.value


def test_so_many_requests_are_under_way_and_one_that_ends_makes_room() -> None:
    admission = Admission(3, 1000)
    account = take(admission, "uid 1", count=3)
    assert "3 requests are under way, and 3 is the most (max_queued)" in str(refusal(admission, "uid 1"))
    admission.release(account, 1)
    take(admission, "uid 2")
    assert admission.stats()["requests"] == 3
    assert admission.stats()["refused"] == 1


def test_so_many_bytes_are_under_way() -> None:
    admission = Admission(100, 1000)
    account = take(admission, "uid 1", 600)
    take(admission, "uid 1", 400)
    assert "have 1000 bytes, and 1000 is the most (max_queued_bytes)" in str(refusal(admission, "uid 1"))
    take(admission, "uid 1", 0)  # it takes no room
    admission.release(account, 600)
    take(admission, "uid 1", 600)


def test_nobody_has_more_than_his_share() -> None:
    admission = Admission(10, 1000, share=0.5)
    take(admission, "uid 1", count=5)
    said = str(refusal(admission, "uid 1"))
    assert said == "5 requests of uid 1 are under way, and 5 is the most for one caller (max_queued)"
    take(admission, "uid 2", 100, count=5)
    # When all is taken, it is nobody's fault in particular.
    assert "10 is the most (max_queued)" in str(refusal(admission, "uid 3"))


def test_a_share_of_one_is_one_request() -> None:
    admission = Admission(1, 10, share=0.5)
    take(admission, "uid 1")
    refusal(admission, "uid 1")


def test_what_can_never_be_taken_is_told_so() -> None:
    admission = Admission(10, 1000, share=0.5)
    with pytest.raises(TooLarge, match=r"501 bytes, .* may have 500 \(max_queued_bytes\)"):
        admission.check(admission.account("uid 1"), 501, 0.0, nothing)
    take(admission, "uid 1", 500)


def test_the_pause_is_bounded_and_a_moment_where_nothing_is_known() -> None:
    admission = Admission(1, 10)
    account = take(admission, "uid 1")
    with pytest.raises(Busy) as caught:
        admission.check(account, 1, 0.0, nothing)
    assert caught.value.retry_after == UNKNOWN
    assert refusal(admission, "uid 1", gap=1e-9).retry_after == SHORTEST
    assert refusal(admission, "uid 1", gap=1e9).retry_after == LONGEST


def test_each_that_is_turned_away_is_told_a_time_of_his_own() -> None:
    admission = Admission(100, 10_000)
    take(admission, "uid 1", count=100)
    told = [refusal(admission, "uid 1").retry_after or 0.0 for _ in range(50)]
    assert told == sorted(set(told))
    assert told[49] - told[0] >= 49
    for _ in range(950):
        last = refusal(admission, "uid 1").retry_after
    assert last is not None
    assert 1000 <= last <= 1000 * (1 + MARGIN) + 34  # a thousand stand before him, and chance
    # When those have not come back, nobody stands before the next.
    after = refusal(admission, "uid 1", now=2000.0).retry_after
    assert after is not None
    assert after <= 1 + MARGIN + 2


def test_of_one_callers_share_fewer_end() -> None:
    admission = Admission(20, 1000, share=0.25)
    take(admission, "uid 1", count=5)
    take(admission, "uid 2", count=5)
    alone = refusal(admission, "uid 1").retry_after
    assert alone == pytest.approx(2 * (1 + MARGIN + 1 + 1))  # of two ends one is his


def test_a_large_one_waits_for_as_many_ends_as_it_needs() -> None:
    admission = Admission(100, 1000)
    take(admission, "uid 1", 100, count=10)
    assert (refusal(admission, "uid 1", 500).retry_after or 0.0) >= 5


# -- the forecast -----------------------------------------------------------------------------------


def test_ends_are_measured_while_calls_wait() -> None:
    forecast = Forecast()
    assert forecast.gap(0.0, nothing) is None
    for number in range(100):
        forecast.ended(5 + number * 0.01, waiting=True)
    assert forecast.gap(6.0, nothing) == pytest.approx(0.01, rel=0.2)
    forecast.ended(6.0, waiting=False)
    # What comes after a pause says nothing of how fast things go.
    forecast.ended(1000.0, waiting=True)
    assert forecast.gap(1000.0, nothing) == pytest.approx(0.01, rel=0.2)


def test_a_few_ends_count_little() -> None:
    forecast = Forecast()
    for number in range(ENDS + 1):
        forecast.ended(number * 0.01, waiting=True)
    for number in range(ENDS):  # by chance as fast again
        forecast.ended((ENDS + number / 2) * 0.01, waiting=True)
    assert forecast.gap(1.0, nothing) == pytest.approx(0.01, rel=0.2)


def test_calls_that_do_not_end_are_noticed() -> None:
    forecast = Forecast()
    forecast.ended(0.0, waiting=True)
    assert forecast.gap(WINDOW / 2, nothing) is None
    assert forecast.gap(60.0, nothing) == pytest.approx(60.0)


def test_the_longer_of_measured_and_predicted_counts() -> None:
    forecast = Forecast()
    for number in range(100):
        forecast.ended(number * 0.01, waiting=True)
    assert forecast.gap(1.0, lambda: 2.0) == 2.0
    assert forecast.gap(1.0 + LOOK / 2, lambda: 3.0) == 2.0  # it is not looked at again so soon
    assert (forecast.gap(1.0 + LOOK, lambda: 0.001) or 1.0) < 0.1


# -- places that were promised --------------------------------------------------------------------


def test_a_place_is_kept_for_who_comes_back_when_told() -> None:
    admission = Admission(100, 1000)
    account = take(admission, "uid 1", count=100)
    busy = refusal_of(admission, "late", now=0.0, gap=0.1)
    assert busy.retry_after is not None
    admission.release(account, 1)
    when = busy.retry_after
    said = str(refusal_of(admission, "newcomer", now=when))
    assert said == "the places that are free were promised to others, who come back"
    admission.check(account, 1, when, nothing, "late")
    admission.take(account, 1)
    admission.release(account, 1)
    admission.check(account, 1, when, nothing, "late again")  # it is kept once


def test_a_place_is_not_kept_for_ever() -> None:
    admission = Admission(100, 1000)
    account = take(admission, "uid 1", count=100)
    busy = refusal_of(admission, "gone", now=0.0, gap=0.1)
    assert busy.retry_after is not None
    admission.release(account, 1)
    refusal_of(admission, "newcomer", now=busy.retry_after + LATE - 0.001)
    admission.check(account, 1, busy.retry_after + LATE + 0.01, nothing, "another")


def test_who_comes_early_is_told_the_rest() -> None:
    admission = Admission(100, 1000)
    take(admission, "uid 1", count=100)
    for number in range(10):
        refusal_of(admission, f"before {number}", now=0.0, gap=1.0)
    first = refusal_of(admission, "early", now=0.0, gap=1.0).retry_after
    again = refusal_of(admission, "early", now=3.0, gap=1.0).retry_after
    assert first is not None
    assert again == pytest.approx(first - 3.0)


def test_a_place_for_large_arguments_is_kept_whole() -> None:
    promises = Promises(100, 1000)
    promises.keep("large", Promise(1.0, 2.0, 200))
    assert promises.leave_room("small", 50, 199, 0.5)
    assert not promises.leave_room("small", 50, 199, 1.0)
    assert promises.leave_room("small", 50, 200, 1.0)
    assert promises.leave_room("large", 1, 0, 1.0)


def test_a_part_of_the_places_is_kept_at_most() -> None:
    promises = Promises(100, 1000)
    for number in range(MOST + 10):
        promises.keep(str(number), Promise(1.0, 2.0, 1000))
    assert len(promises) == MOST
    assert not promises.leave_room("newcomer", 25, 250, 1.0)
    assert promises.leave_room("newcomer", 26, 250, 1.0)


def test_it_is_learned_how_many_come_back() -> None:
    promises = Promises(100, 1000)
    for number in range(200):
        promises.keep(str(number), Promise(1.0, 2.0, 1))
    assert promises.due == 0
    assert promises.leave_room("0", 1, 1, 1.0)
    assert promises.due == 200
    promises.redeem("0")
    assert promises.returning == 1.0
    assert promises.leave_room("newcomer", 1, 1, 2.0 + LATE)
    assert (promises.due, len(promises)) == (0, 0)
    assert promises.returning < 0.1


def refusal_of(admission: Admission, id: str, *, now: float, gap: float = 1.0) -> Busy:
    with pytest.raises(Busy) as caught:
        admission.check(admission.account("uid 1"), 1, now, lambda: gap, id)
    return caught.value


# -- is it the truth? -------------------------------------------------------------------------------


class Simulation:
    """A service with some workers, and callers who come, and come back when they are told to. Events are
    (when, number, what).
    """

    def __init__(self, workers: int, most: int, seconds: Callable[[], float]) -> None:
        self.admission = Admission(most, 1_000_000)
        self.account = self.admission.account("uid 1")
        self.forecast = Forecast()
        self.seconds = seconds
        self.workers = workers
        self.running = 0
        self.waiting = 0
        self.now = 0.0
        self.tries: dict[int, int] = {}
        self.early: list[bool] = []  # of those that came back: whether there was no room
        self.busy = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def run(self) -> None:
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()

    def arrive(self, caller: int, *, back: bool = True) -> None:
        tries = self.tries[caller] = self.tries.get(caller, 0) + 1
        try:
            self.admission.check(
                self.account, 1, self.now, lambda: self.forecast.gap(self.now, nothing), str(caller)
            )
        except Busy as busy:
            if tries > 1:
                self.early.append(True)
            assert busy.retry_after is not None
            if not back:
                return
            self.at(self.now + busy.retry_after, lambda: self.arrive(caller))
            return
        if tries > 1:
            self.early.append(False)
        self.admission.take(self.account, 1)
        self.waiting += 1
        self._begin()

    def _begin(self) -> None:
        while self.waiting and self.running < self.workers:
            self.waiting -= 1
            self.running += 1
            seconds = self.seconds()
            self.busy += seconds
            self.at(self.now + seconds, self._end)

    def _end(self) -> None:
        self.running -= 1
        self.admission.release(self.account, 1)
        self.forecast.ended(self.now, self.waiting > 0)
        self._begin()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "mean"), [("constant", 0.05), ("exponential", 0.05), ("two kinds", 0.05)])
def test_under_lasting_overload_no_worker_idles(name: str, mean: float, seed: int) -> None:
    chance = random.Random(seed)
    seconds = {
        "constant": lambda: mean,
        "exponential": lambda: chance.expovariate(1 / mean),
        "two kinds": lambda: chance.choice((mean / 5, mean * 9 / 5)),
    }[name]
    world = Simulation(4, 200, seconds)
    count = 4000
    for caller in range(count):  # one and a half times as fast as they can be served
        world.at(caller * mean / 4 / 1.5, lambda caller=caller: world.arrive(caller))  # type: ignore[misc]
    world.run()
    assert len(world.early) > 300
    # Nobody is told to stay away for longer than needs be, and who comes back finds room.
    assert world.busy / 4 / world.now > 0.85
    assert sum(world.early) / len(world.early) < 0.2


def test_those_who_come_back_are_served_beside_others_who_only_ask_again() -> None:
    chance = random.Random(1)
    world = Simulation(4, 200, lambda: chance.expovariate(1 / 0.05))
    numbers = itertools.count(1_000_000)

    def ask_again() -> None:  # every 10 ms, each time as another request
        world.arrive(next(numbers), back=False)
        if world.now < 40:
            world.at(world.now + 0.01, ask_again)

    world.at(0.0, ask_again)
    for caller in range(2000):
        world.at(caller * 0.05 / 4 / 0.75, lambda caller=caller: world.arrive(caller))  # type: ignore[misc]
    world.run()
    assert world.busy / 4 / world.now > 0.85
    assert sum(world.early) / len(world.early) < 0.25


@pytest.mark.parametrize("seed", range(5))
def test_who_comes_back_from_a_burst_when_told_finds_room(seed: int) -> None:
    chance = random.Random(seed)
    world = Simulation(2, 100, lambda: chance.expovariate(100))
    for number in range(100):  # what calls took before is known
        world.forecast.ended(-1 + number * 0.005, waiting=True)
    for caller in range(300):
        world.at(0.0, lambda caller=caller: world.arrive(caller))  # type: ignore[misc]
    world.run()
    assert len(world.early) >= 200
    assert sum(world.early) / len(world.early) < 0.2
