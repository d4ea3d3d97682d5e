"""How the two kinds of calls share the workers: neither starves, whatever the other does."""

import heapq
import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.calls import RETURNED, Answer, Call, Failure, Outcome
from workers.dispatcher import GRACE, OVERDUE_CHECK, Dispatcher, Doom, Plea, Running
from workers.errors import CallCancelled, CallTimeout, Poisoned, WorkerLost
from workers.lanes import UNLIMITED
from workers.overlapping import BRIEF

IDLE = Running(0, 0.0)
MOST = 5


def lost(call: Call) -> WorkerLost:
    return WorkerLost(f"lost {call.task}")


class Scene:
    """A dispatcher that knows what tasks take, by their names: "plain 2.5", "co 0.05"; "co" is not known."""

    def __init__(self, workers: int, known: Iterable[str] = ()) -> None:
        self.dispatcher = Dispatcher(overlap=MOST)
        self.now = 0.0
        self.held: dict[int, list[Call]] = {}
        for name in known:
            self.dispatcher._learn(name, float(name.split()[1]))
        for id in range(1, workers + 1):
            self.ready(id)

    def ready(self, id: int) -> None:
        self.held[id] = []
        self.dispatcher.worker_ready(id, self.now)

    def submit(self, name: str, count: int = 1, **options: object) -> list[Call]:
        kind = {"overlaps": True, "concurrency": UNLIMITED} if name.startswith("co") else {}
        calls = [
            Call(name, None, **{**kind, **options})  # type: ignore[arg-type]
            for _ in range(count)
        ]
        for call in calls:
            self.dispatcher.submit(call)
        return calls

    def assign(self) -> dict[int, list[Call]]:
        given = dict(self.dispatcher.assign(self.now))
        for worker, calls in given.items():
            self.held[worker] += calls
            assert len({call.overlaps for call in self.held[worker]}) == 1
            assert len(self.held[worker]) <= MOST or not calls[0].overlaps
        return given

    def done(self, *calls: Call, seconds: float | None = None) -> list[Outcome]:
        outcomes = []
        for call in calls:
            (worker,) = [worker for worker, held in self.held.items() if call in held]
            self.held[worker].remove(call)
            took = float(call.task.split()[1]) if seconds is None else seconds
            outcome = self.dispatcher.answered(worker, Answer(call.number, took, b"1"), self.now)
            assert outcome is not None and outcome.call is call
            outcomes.append(outcome)
        return outcomes

    def counts(self) -> list[int]:
        return [len(self.held[worker]) for worker in sorted(self.held)]


def running(call: Call, since: float = 0.0) -> Running:
    return Running(call.number, since)


# -- who goes where


def test_calls_that_overlap_spread_over_all_workers_up_to_their_count() -> None:
    scene = Scene(3, ["co 0.05"])
    calls = scene.submit("co 0.05", 2)
    scene.assign()
    assert scene.counts() == [1, 1, 0]
    calls += scene.submit("co 0.05", 20)
    scene.assign()
    assert scene.counts() == [MOST] * 3
    scene.done(*scene.held[2][:3])
    scene.assign()
    assert scene.counts() == [MOST] * 3


def test_their_limit_is_over_all_workers() -> None:
    scene = Scene(2, ["co 0.05"])
    first, *_ = scene.submit("co 0.05", 10, concurrency=3)
    scene.assign()
    assert sum(scene.counts()) == 3
    scene.done(first)
    assert sum(map(len, scene.assign().values())) == 1


@pytest.mark.parametrize("name", ["co", "co 5"])
def test_calls_that_may_last_leave_one_of_several_workers_alone(name: str) -> None:
    scene = Scene(3, ["co 5", "co 0.05", "plain 0.0001"])
    scene.submit(name, 20)
    brief = scene.submit("co 0.05", 2)
    scene.assign()
    assert scene.counts() == [MOST, MOST, 2] and scene.held[3] == brief
    scene.done(*brief)
    (plain,) = scene.submit("plain 0.0001")
    assert scene.assign() == {3: [plain]}
    single = Scene(1)
    single.submit(name, 3)
    single.assign()
    assert single.counts() == [3]


def test_while_plain_calls_wait_the_others_share_one_worker() -> None:
    scene = Scene(3, ["co 0.05", "plain 5"])
    scene.submit("co 0.05", 5)
    scene.assign()
    assert scene.counts() == [2, 2, 1]
    plain = scene.submit("plain 5", 3)
    scene.submit("co 0.05", 10)
    scene.assign()
    assert scene.counts() == [MOST, 2, 1]
    scene.done(*scene.held[2], *scene.held[3])
    assert scene.assign() == {2: [plain[0]], 3: [plain[1]]}
    scene.done(*scene.held[1])  # all at once, and the last plain call is the older
    assert scene.assign() == {1: [plain[2]]}


def test_calls_that_overlap_get_a_worker_when_their_turn_comes() -> None:
    scene = Scene(2, ["co 0.05", "plain 0.0001"])
    scene.submit("plain 0.0001", 100)
    scene.assign()
    co = scene.submit("co 0.05", 3)
    later = scene.submit("plain 0.0001", 100)
    while not any(call.overlaps for call in scene.held[1] + scene.held[2]):
        assert not set(later) & set(scene.held[1] + scene.held[2])
        scene.done(scene.held[1][0] if scene.held[1] else scene.held[2][0])
        scene.assign()
    assert scene.held[1] == co  # it fell idle first
    scene.done(*scene.held[2])
    scene.assign()
    assert scene.held[2] and set(scene.held[2]) <= set(later)


def test_a_single_worker_takes_turns() -> None:
    scene = Scene(1, ["co 0.05", "plain 0.0001"])
    first = scene.submit("co 0.05", 2)
    scene.assign()
    (plain,) = scene.submit("plain 0.0001")
    last = scene.submit("co 0.05", 2)
    scene.done(first[0])
    assert scene.assign() == {}  # what is behind the plain call does not join
    scene.done(first[1])
    assert scene.assign() == {1: [plain]}
    scene.done(plain)
    assert scene.assign() == {1: last}


class Simulation:
    """Workers that run what they get, in simulated time; each call takes what its name says."""

    def __init__(self, workers: int, known: list[str]) -> None:
        self.scene = Scene(workers, known)
        self.events: list[tuple[float, int, Call]] = []
        self.order = itertools.count()
        self.waited: dict[Call, float] = {}
        self.submitted: dict[Call, float] = {}

    def submit(self, name: str, count: int) -> None:
        for call in self.scene.submit(name, count):
            self.submitted[call] = self.scene.now

    def run(self, until: float) -> None:
        while True:
            for calls in self.scene.assign().values():
                end = self.scene.now
                for call in calls:
                    self.waited[call] = self.scene.now - self.submitted[call]
                    seconds = float(call.task.split()[1])
                    end = self.scene.now + seconds if call.overlaps else end + seconds
                    heapq.heappush(self.events, (end, next(self.order), call))
            if not self.events or self.events[0][0] > until:
                break
            self.scene.now, _, call = heapq.heappop(self.events)
            self.scene.done(call)
        self.scene.now = until


NAMES = ["co 0.05", "co 0.5", "co 1000", "plain 0.0001", "plain 0.1"]


@settings(max_examples=60, deadline=None)
@given(
    workers=st.integers(2, 4),
    ahead=st.sampled_from(["co", "plain"]),
    burst=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 30)), max_size=6),
)
def test_neither_kind_starves_while_the_other_never_ends(
    workers: int, ahead: str, burst: list[tuple[str, int]]
) -> None:
    """There is always more of the one kind; a call of the other has a worker soon all the same, even among
    others that never end.
    """
    simulation = Simulation(workers, NAMES)
    flood, item = ("co 0.05", "plain 0.1") if ahead == "co" else ("plain 0.1", "co 0.05")
    work = 0.0
    for name, count in burst:
        simulation.submit(name, count)
        work += 0.0 if name == "co 1000" else float(name.split()[1]) * count
    simulation.submit(flood, 100)
    simulation.run(0.0)
    before = set(simulation.submitted)
    simulation.submit(item, 1)
    (call,) = set(simulation.submitted) - before
    limit = work + 100 * 0.1 + BRIEF
    while call not in simulation.waited:
        assert simulation.scene.now < limit, f"{item} starves: {simulation.scene.dispatcher}"
        simulation.submit(flood, 20)
        simulation.run(simulation.scene.now + 0.1)


# -- deaths, limits, cancels


def test_all_that_ran_pay_for_a_death_each_from_its_own_budget() -> None:
    scene = Scene(1, ["co 0.05"])
    poor, rich, waiting = [scene.submit("co 0.05", 1, crashes=crashes)[0] for crashes in (0, 1, 0)]
    scene.assign()
    outcomes = scene.dispatcher.worker_lost(1, [poor.number, rich.number], lost)
    assert [(outcome.call, type(outcome.error)) for outcome in outcomes] == [(poor, WorkerLost)]
    assert (rich.crashed, waiting.crashed) == (1, 0)
    scene.ready(2)
    assert scene.assign() == {2: [rich, waiting]}
    (outcome,) = scene.dispatcher.worker_lost(2, [rich.number], lost)
    assert isinstance(outcome.error, Poisoned)


def test_a_running_call_is_cancelled_alone_and_has_its_error_when_it_has_ended() -> None:
    scene = Scene(1, ["co 5"])
    item, other = scene.submit("co 5", 2)
    scene.assign()
    assert scene.dispatcher.cancel(item.number, 0.0, running(item)) == Plea(1, item.number)
    assert scene.dispatcher.cancel(item.number, 0.0, running(item)) is None
    failure = Failure("task_error", "CancelledError", "CancelledError", None, True)
    outcome = scene.dispatcher.answered(1, Answer(item.number, 0.1, None, failure), 0.1)
    assert outcome is not None and isinstance(outcome.error, CallCancelled)
    assert scene.dispatcher.next_deadline() is None
    scene.held[1].remove(item)
    scene.done(other)


def test_one_that_does_not_end_costs_its_worker_and_nobody_else() -> None:
    scene = Scene(1, ["co 5"])
    item = scene.submit("co 5", timeout=1.0)[0]
    other = scene.submit("co 5")[0]
    scene.assign()
    runs = {item.number: running(item, 0.5), other.number: running(other, 0.5)}
    assert scene.dispatcher.due(1.0, runs.__getitem__) == ([], [])
    assert scene.dispatcher.due(1.5, runs.__getitem__) == ([], [Plea(1, item.number)])
    assert scene.dispatcher.due(1.5 + GRACE / 2, runs.__getitem__) == ([], [])
    _, (doom,) = scene.dispatcher.due(1.5 + GRACE, runs.__getitem__)
    assert isinstance(doom, Doom) and isinstance(doom.error, CallTimeout)
    (outcome,) = scene.dispatcher.worker_lost(1, list(runs), lost)
    assert (
        outcome.call is item and isinstance(outcome.error, CallTimeout) and "1 seconds" in str(outcome.error)
    )
    assert other.crashed == 0
    scene.ready(2)
    assert scene.assign() == {2: [other]}


def test_a_call_that_was_to_end_is_not_charged_for_a_death() -> None:
    scene = Scene(1, ["co 5"])
    item, other = scene.submit("co 5", 2, crashes=1)
    scene.assign()
    scene.dispatcher.cancel(item.number, 0.0, running(item))
    (outcome,) = scene.dispatcher.worker_lost(1, [item.number, other.number], lost)
    assert outcome.call is item and isinstance(outcome.error, CallCancelled)
    assert (item.crashed, other.crashed) == (0, 1)  # it was no kill of ours


def test_an_answer_on_its_way_is_waited_for() -> None:
    scene = Scene(1, ["co 5"])
    (item,) = scene.submit("co 5")
    scene.assign()
    scene.dispatcher.cancel(item.number, 0.0, running(item))
    assert scene.dispatcher.due(GRACE, lambda number: IDLE) == ([], [])
    assert scene.dispatcher.next_deadline() == GRACE + OVERDUE_CHECK
    assert scene.done(item)[0].result == b"1"


def test_one_that_is_given_up_before_it_begins_is_cancelled_if_it_does() -> None:
    scene = Scene(1, ["co 5"])
    (item,) = scene.submit("co 5")
    scene.assign()
    outcome = scene.dispatcher.cancel(item.number, 0.0, IDLE)
    assert isinstance(outcome, Outcome) and isinstance(outcome.error, CallCancelled)
    later = OVERDUE_CHECK * 3
    assert scene.dispatcher.due(later, lambda number: running(item)) == ([], [Plea(1, item.number)])
    assert scene.dispatcher.answered(1, Answer(item.number, 0.0, b"1"), later) is None
    assert (scene.dispatcher.assigned, len(scene.dispatcher)) == (0, 0)
    assert scene.dispatcher.next_deadline() is None


def test_who_has_not_cancelled_what_it_was_to_gets_more_last() -> None:
    scene = Scene(2, ["co 0.05"])
    first, second = scene.submit("co 0.05", 2)
    scene.assign()
    scene.dispatcher.cancel(first.number, 0.0, running(first))
    scene.submit("co 0.05", 4)
    scene.assign()
    assert scene.counts() == [1, 5] and second in scene.held[2]


def test_a_call_that_is_given_back_is_queued_again() -> None:
    scene = Scene(1, ["co 5"])
    item, other = scene.submit("co 5", 2)
    scene.assign()
    answer = Answer(item.number, 0.0, None, Failure(RETURNED, ""))
    assert scene.dispatcher.answered(1, answer, 0.0) is None
    scene.held[1].remove(item)
    assert scene.assign() == {1: [item]}
    scene.done(item, other)
    assert scene.dispatcher._workers[1].load == 0


def test_those_that_were_to_end_have_the_receipt_of_the_death() -> None:
    scene = Scene(1, ["co 5"])
    doomed, asked, other = scene.submit("co 5", 3)
    scene.assign()
    runs = {item.number: running(item) for item in (doomed, asked, other)}
    assert scene.dispatcher.cancel(doomed.number, 0.0, running(doomed)) == Plea(1, doomed.number)
    assert scene.dispatcher.cancel(asked.number, 0.5, running(asked)) == Plea(1, asked.number)
    _, (doom,) = scene.dispatcher.due(GRACE, runs.__getitem__)
    assert isinstance(doom, Doom) and not doom.at_once

    def told(item: Call) -> WorkerLost:
        return WorkerLost("lost", receipt={"number": item.number, "attempt": item.attempt})

    outcomes = scene.dispatcher.worker_lost(1, list(runs), told)
    assert [(outcome.call, type(outcome.error)) for outcome in outcomes] == [
        (doomed, CallCancelled),
        (asked, CallCancelled),
    ]
    receipts = [outcome.error and outcome.error.receipt for outcome in outcomes]
    assert receipts == [{"number": item.number, "attempt": 1} for item in (doomed, asked)]


# -- beside the options of tasks


def shared(call: Call) -> Call:
    assert call.run is not None
    return call.run


def test_calls_with_a_key_share_a_run_that_overlaps_others() -> None:
    scene = Scene(1, ["co 5"])
    first, second = scene.submit("co 5", 2, key=b"k")
    run = shared(first)
    assert scene.assign() == {1: [run]} and shared(second) is run and run.overlaps
    outcome = scene.dispatcher.cancel(first.number, 0.0, running(run))
    assert isinstance(outcome, Outcome) and outcome.call is first
    assert scene.dispatcher.cancel(second.number, 0.0, running(run)) == Plea(1, run.number)
    failure = Failure("task_error", "CancelledError", "CancelledError")
    outcome = scene.dispatcher.answered(1, Answer(run.number, 0.1, None, failure), 0.1)
    assert outcome is not None and outcome.call is second and isinstance(outcome.error, CallCancelled)
    assert (len(scene.dispatcher), scene.dispatcher.assigned) == (0, 0)
    assert scene.dispatcher.next_deadline() is None


def test_each_of_them_has_its_own_deadline_and_the_last_ends_the_run() -> None:
    scene = Scene(1, ["co 5"])
    early, late = [scene.submit("co 5", key=b"k", deadline=when)[0] for when in (1.0, 2.0)]
    scene.assign()
    run = shared(early)
    asked: list[int] = []

    def look(number: int) -> Running:
        asked.append(number)
        return running(run)

    (outcome,), dooms = scene.dispatcher.due(1.0, look)
    assert outcome.call is early and isinstance(outcome.error, CallTimeout) and dooms == []
    assert scene.dispatcher.due(2.0, look) == ([], [Plea(1, run.number)])
    assert set(asked) == {run.number}
    (outcome,) = scene.dispatcher.worker_lost(1, [run.number], lost)
    assert outcome.call is late and isinstance(outcome.error, CallTimeout)


def test_one_of_higher_priority_lifts_the_run_while_it_waits() -> None:
    scene = Scene(1, ["co 5"])
    ahead = scene.submit("co 5", MOST)
    scene.assign()
    (before,) = scene.submit("co 5")
    (low,) = scene.submit("co 5", key=b"k")
    scene.submit("co 5", key=b"k", priority=1)
    scene.done(ahead[0])
    assert scene.assign() == {1: [shared(low)]}
    scene.done(ahead[1])
    assert scene.assign() == {1: [before]}


def test_an_isolated_call_makes_place_among_calls_that_overlap() -> None:
    scene = Scene(2, ["co 0.05", "plain 1"])
    first, second = scene.submit("co 0.05", 2)
    scene.assign()
    (alone,) = scene.submit("plain 1", isolated=True, concurrency=UNLIMITED)
    scene.submit("co 0.05", 2)
    scene.assign()
    assert scene.counts() == [3, 1]  # one waits that is not theirs, so they have one worker
    scene.done(second)
    assert scene.assign() == {} and scene.dispatcher.spent == [2]
    scene.submit("co 0.05", 5)
    scene.assign()
    assert scene.counts() == [MOST, 0]
    scene.dispatcher.worker_lost(2, (), lost)
    scene.ready(3)
    assert scene.assign() == {3: [alone]}
    assert first in scene.held[1]


def test_a_worker_that_makes_place_gets_no_calls_that_overlap() -> None:
    scene = Scene(2, ["co 0.05", "plain 1"])
    scene.done(*scene_used(scene, 2))
    scene.submit("plain 1", isolated=True, concurrency=UNLIMITED)
    behind = scene.submit("co 0.05", 2)
    assert scene.assign() == {2: behind} and scene.dispatcher.spent == [1]


def scene_used(scene: Scene, count: int) -> list[Call]:
    """Calls that overlap, one on each worker."""
    calls = scene.submit("co 0.05", count)
    scene.assign()
    assert scene.counts() == [1] * count
    return calls


def test_an_isolated_call_on_a_single_worker_waits_for_those_before_it_and_no_others() -> None:
    scene = Scene(1, ["co 0.05", "plain 1"])
    ahead = scene.submit("co 0.05", 2)
    scene.assign()
    (alone,) = scene.submit("plain 1", isolated=True, concurrency=UNLIMITED)
    behind = scene.submit("co 0.05", 2)
    scene.done(ahead[0])
    assert scene.assign() == {} and scene.dispatcher.spent == []
    scene.done(ahead[1])
    assert scene.assign() == {} and scene.dispatcher.spent == [1]
    scene.dispatcher.worker_lost(1, (), lost)
    scene.ready(2)
    assert scene.assign() == {2: [alone]}
    scene.done(alone)
    scene.dispatcher.worker_lost(2, (), lost)
    scene.ready(3)
    assert scene.assign() == {3: behind}


# -- how many workers there should be


def test_a_worker_that_holds_some_is_not_idle() -> None:
    scene = Scene(3, ["co 5"])
    scene.submit("co 5")
    scene.assign()
    assert scene.dispatcher.idle == 2 and scene.dispatcher.backlog() == (0, 0.0)
    assert sorted(scene.dispatcher.dismiss(3)) == [2, 3]


def test_those_that_find_room_ask_for_no_worker_and_others_for_one_that_holds_many() -> None:
    scene = Scene(1, ["co 5"])
    scene.submit("co 5", MOST + 7)
    scene.assign()
    assert scene.dispatcher.idle == 0
    assert scene.dispatcher.backlog() == (2, 7.0)  # 7 calls of 5 seconds, 5 at a time
    scene.done(*scene.held[1][:3])
    assert scene.dispatcher.backlog() == (1, 4.0)
    scene.assign()
    assert scene.dispatcher.backlog() == (1, 4.0)
    scene.done(*scene.held[1][:4])
    scene.assign()
    assert scene.dispatcher.backlog() == (0, 0.0)


def test_the_worker_that_they_leave_alone_does_not_keep_others_from_coming() -> None:
    scene = Scene(2, ["co 5"])
    scene.submit("co 5", MOST + 3)
    scene.assign()
    assert scene.counts() == [MOST, 0]
    assert scene.dispatcher.idle == 0 and scene.dispatcher.backlog() == (1, 3.0)
    scene.ready(3)
    scene.assign()
    assert scene.counts() == [MOST, 3, 0]
    assert scene.dispatcher.idle == 1 and scene.dispatcher.backlog() == (0, 0.0)


def test_brief_ones_find_room_where_lasting_ones_do_not() -> None:
    scene = Scene(2, ["co 5", "co 0.05", "plain 5"])
    scene.submit("co 5", MOST)
    scene.submit("co 0.05", 1)
    scene.assign()
    assert scene.counts() == [MOST, 1]
    scene.submit("co 5", 1)
    scene.submit("co 0.05", MOST)
    assert scene.dispatcher.backlog() == (1, pytest.approx(5.05 / MOST))  # one of each kind
