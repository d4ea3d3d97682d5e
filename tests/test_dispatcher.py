"""The dispatcher as a state machine: no process, no socket, no clock."""

import math
from collections import Counter, deque
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.assigning import MEMORY_CHECK, STUCK
from workers.calls import ABANDONED, OUTGROWN, RETURNED, Answer, Call, Failure, Outcome
from workers.dispatcher import OVERDUE_CHECK, Dispatcher, Doom, Plea, Running
from workers.errors import (
    CallCancelled,
    CallTimeout,
    Poisoned,
    ShuttingDown,
    TaskError,
    WorkerLost,
)
from workers.lanes import UNLIMITED

IDLE = Running(0, 0.0)
WINDOW, TINY = 2.0**-9, 2.0**-13  # 16 fit, without rounding
RAISED = Failure("task_error", "ValueError: no", "ValueError", None, True)
FATAL = Failure("task_error", "KeyError: no", "KeyError", None, False)


def lost(call: Call) -> WorkerLost:
    return WorkerLost(f"lost {call.task}", receipt={"attempt": call.attempt})


def idle(worker: int) -> Running:
    return IDLE


def call(task: str = "tiny", **options: object) -> Call:
    return Call(task, None, **options)  # type: ignore[arg-type]


def taught(workers: int = 1, **costs: float) -> Dispatcher:
    """A dispatcher with ready workers, which knows what tasks take."""
    dispatcher = Dispatcher(window=WINDOW)
    dispatcher.worker_ready(0, 0.0)
    for task, seconds in costs.items():
        number = dispatcher.submit(call(task))
        assert dict(dispatcher.assign(0.0)).keys() == {0}
        assert dispatcher.answered(0, Answer(number, seconds, b"1"), 0.0)
    dispatcher.worker_lost(0, (), lost)
    for id in range(1, workers + 1):
        dispatcher.worker_ready(id, 0.0)
    return dispatcher


def assigned(dispatcher: Dispatcher, now: float = 0.0) -> dict[int, list[Call]]:
    return dict(dispatcher.assign(now))


def done(dispatcher: Dispatcher, worker: int, item: Call, seconds: float = 1e-5, now: float = 0.0) -> Outcome:
    outcome = dispatcher.answered(worker, Answer(item.number, seconds, b"1"), now)
    assert outcome is not None and outcome.call is item and outcome.result == b"1"
    return outcome


def empty(dispatcher: Dispatcher) -> bool:
    """No table holds anything of any call."""
    tables = (dispatcher._calls, dispatcher._holder, dispatcher._queues, dispatcher._order, dispatcher._lanes,
              dispatcher._overlapping)  # fmt: skip
    timers = (dispatcher._deadlines, dispatcher._limits, dispatcher._backoff)
    counters = (dispatcher.queued, dispatcher.assigned, dispatcher._stale, len(dispatcher))
    tables = (*tables, dispatcher._sharing)
    return not any(tables) and not any(map(len, timers)) and not any(counters)


# -- credit


def test_tiny_calls_travel_together_up_to_the_window() -> None:
    dispatcher = taught(tiny=TINY)
    for _ in range(100):
        dispatcher.submit(call())
    batches = assigned(dispatcher)
    assert len(batches[1]) == 16
    assert repr(dispatcher) == "<Dispatcher 1 workers, 84 queued, 16 assigned>"
    assert assigned(dispatcher) == {}


def test_the_number_of_calls_is_limited_too() -> None:
    dispatcher = taught(2, tiny=0.0)
    for _ in range(2000):
        dispatcher.submit(call())
    assert {id: len(calls) for id, calls in assigned(dispatcher).items()} == {1: 512, 2: 512}


def test_an_unknown_call_is_alone() -> None:
    dispatcher = taught(2, tiny=0.0)
    unknown = [call("unknown") for _ in range(3)]
    for item in [*unknown, call(), call()]:
        dispatcher.submit(item)
    assert assigned(dispatcher) == {1: [unknown[0]], 2: [unknown[1]]}
    assert assigned(dispatcher) == {}


def test_a_long_call_is_alone() -> None:
    dispatcher = taught(1, long=1.0, tiny=0.0001)
    long, behind = call("long"), call()
    dispatcher.submit(long)
    dispatcher.submit(behind)
    assert assigned(dispatcher) == {1: [long]}
    done(dispatcher, 1, long, 1.0)
    assert assigned(dispatcher) == {1: [behind]}


def test_the_least_loaded_worker_is_next() -> None:
    dispatcher = taught(3, tiny=0.0001)
    calls = [call() for _ in range(9)]
    for item in calls:
        dispatcher.submit(item)
    assert {id: len(batch) for id, batch in assigned(dispatcher).items()} == {1: 3, 2: 3, 3: 3}


def test_an_idle_worker_is_taken_before_one_whose_load_was_rounded() -> None:
    dispatcher = taught(2, tiny=0.0001)
    dispatcher.submit(first := call())
    assert assigned(dispatcher) == {1: [first]}
    dispatcher._workers[1].load = -1e-19
    dispatcher.submit(unknown := call("unknown"))
    assert assigned(dispatcher) == {2: [unknown]}


def test_long_calls_leave_a_worker_for_tiny_ones() -> None:
    dispatcher = taught(2, long=1.0, tiny=TINY)
    longs, tinies = [call("long") for _ in range(2)], [call() for _ in range(50)]
    for item in (longs[0], *tinies, longs[1]):
        dispatcher.submit(item)
    batches = assigned(dispatcher)
    assert batches[1] == [longs[0]] and batches[2] == tinies[:16]
    finished = 0
    while longs[1] not in batches[2]:
        for item in batches[2]:
            done(dispatcher, 2, item)
            finished += 1
        batches = assigned(dispatcher)
    assert finished == 50  # nobody overtook anybody, and nobody waited for the long one


def test_a_worker_that_is_silent_gets_no_more() -> None:
    dispatcher = taught(2, tiny=0.0001)
    dispatcher.submit(first := call())
    assert assigned(dispatcher) == {1: [first]}
    dispatcher.submit(second := call())
    dispatcher.submit(third := call())
    assert assigned(dispatcher, 2 * STUCK) == {2: [second, third]}
    done(dispatcher, 1, first, now=2 * STUCK)
    for item in [call() for _ in range(6)]:
        dispatcher.submit(item)
    assert set(assigned(dispatcher, 2 * STUCK)) == {1, 2}


def test_a_call_that_is_queued_while_all_are_silent_goes_to_the_first_that_answers() -> None:
    dispatcher = taught(2, tiny=0.0001)
    items = [call(), call()]
    for item in items:
        dispatcher.submit(item)
    assigned(dispatcher)
    dispatcher.submit(waiting := call())
    assert assigned(dispatcher, 1.0) == {}
    done(dispatcher, 2, items[1], now=1.0)
    assert assigned(dispatcher, 1.0) == {2: [waiting]}


def test_one_slow_run_does_not_close_the_window_of_a_tiny_task() -> None:
    dispatcher = taught(1, tiny=0.00001)
    dispatcher.submit(slow := call())
    assigned(dispatcher)
    done(dispatcher, 1, slow, 0.01)
    assert dispatcher.predicted("tiny") == pytest.approx(0.00001 + 0.00999 / 16)
    assert dispatcher.predicted("never") is None


def test_nonsense_run_times_do_not_break_the_prediction() -> None:
    dispatcher = taught(1, tiny=0.0)
    for seconds in (float("nan"), -5.0, 0.0):
        dispatcher.submit(item := call())
        assigned(dispatcher)
        done(dispatcher, 1, item, seconds)
    assert dispatcher.predicted("tiny") == pytest.approx(1e-6)


# -- order


def test_first_in_first_out_within_a_priority_and_the_higher_first() -> None:
    dispatcher = taught(1, tiny=0.0001)
    calls = [call(priority=priority) for priority in (0, 5, 0, -1, 5)]
    for item in calls:
        dispatcher.submit(item)
    assert assigned(dispatcher) == {1: [calls[1], calls[4], calls[0], calls[2], calls[3]]}


def test_requeued_calls_come_first_in_their_old_order() -> None:
    dispatcher = taught(1, tiny=0.0001)
    calls = [call(priority=priority) for priority in (0, 0, 1, 1)]
    for item in calls:
        dispatcher.submit(item)
    assert assigned(dispatcher) == {1: [calls[2], calls[3], calls[0], calls[1]]}
    later = [call(priority=1), call()]
    for item in later:
        dispatcher.submit(item)
    assert dispatcher.worker_lost(1, (), lost) == []
    dispatcher.worker_ready(2, 0.0)
    assert assigned(dispatcher) == {2: [calls[2], calls[3], later[0], calls[0], calls[1], later[1]]}
    assert [item.attempt for item in calls] == [1, 1, 1, 1]


def test_returned_calls_come_first_in_their_old_order_and_go_elsewhere() -> None:
    dispatcher = taught(1, tiny=0.0001)
    calls = [call() for _ in range(4)]
    for item in calls:
        dispatcher.submit(item)
    assigned(dispatcher)
    dispatcher.submit(later := call())
    old = [item.number for item in calls]
    for item in reversed(calls[1:]):
        assert dispatcher.answered(1, Answer(item.number, 0.0, None, Failure(RETURNED, "")), 0.0) is None
    assert assigned(dispatcher) == {1: []} or not assigned(dispatcher)  # its worker is busy for long
    dispatcher.worker_ready(2, 0.0)
    assert assigned(dispatcher) == {2: [*calls[1:], later]}
    assert [item.attempt for item in calls] == [1, 1, 1, 1]
    assert all(item.number not in old for item in calls[1:])
    done(dispatcher, 1, calls[0], 1.0)
    dispatcher.submit(last := call(priority=9))
    assert 1 in assigned(dispatcher) and dispatcher.holder(last.number) == 1


def test_a_cancelled_call_that_is_returned_stays_cancelled() -> None:
    dispatcher = taught(1, tiny=0.0001)
    calls = [call(), call()]
    for item in calls:
        dispatcher.submit(item)
    assigned(dispatcher)
    assert isinstance(dispatcher.cancel(calls[1].number, 0.0, IDLE), Outcome)
    assert dispatcher.answered(1, Answer(calls[1].number, 0.0, None, Failure(RETURNED, "")), 0.0) is None
    done(dispatcher, 1, calls[0])
    assert empty(dispatcher)


# -- concurrency


def test_a_task_at_its_limit_is_in_nobodys_way() -> None:
    dispatcher = taught(4, tiny=1.0, only=1.0)
    limited = [call("only", concurrency=2) for _ in range(5)]
    others = [call() for _ in range(2)]
    for item in (*limited, *others):
        dispatcher.submit(item)
    assert assigned(dispatcher) == {1: [limited[0]], 2: [limited[1]], 3: [others[0]], 4: [others[1]]}
    done(dispatcher, 4, others[1], 1.0)
    assert assigned(dispatcher) == {}
    done(dispatcher, 1, limited[0], 1.0)
    assert assigned(dispatcher) == {1: [limited[2]]}
    assert dispatcher.queued == 2


def test_limited_calls_take_turns_with_others_by_priority_and_age() -> None:
    dispatcher = taught(1, tiny=1.0, only=1.0, once=1.0)
    order = [
        call("only", concurrency=1),
        call(),
        call("once", concurrency=1),
        call("only", concurrency=1),
        call(priority=1),
        call("only", concurrency=1, priority=1),
    ]
    for item in order:
        dispatcher.submit(item)
    for expected in (order[4], order[5], *order[:4]):
        assert assigned(dispatcher) == {1: [expected]}
        done(dispatcher, 1, expected, 1.0)
    assert empty(dispatcher)


def test_limited_calls_that_are_put_back_keep_their_turn() -> None:
    dispatcher = taught(1, tiny=TINY, only=TINY)
    items = [call(task, concurrency=3 if task == "only" else None) for task in ["only", "tiny"] * 3]
    for item in items:
        dispatcher.submit(item)
    assert assigned(dispatcher) == {1: items}
    later = [call("only", concurrency=3), call()]
    for item in later:
        dispatcher.submit(item)
    dispatcher.worker_lost(1, (), lost)
    dispatcher.worker_ready(2, 0.0)
    assert assigned(dispatcher) == {2: [*items, later[1]]}
    done(dispatcher, 2, items[0])
    assert assigned(dispatcher) == {2: [later[0]]}


@pytest.mark.parametrize("how", ["cancelled", "retried", "lost", "returned", "given up"])
def test_a_place_is_free_again_however_a_call_leaves_it(how: str) -> None:
    dispatcher = taught(1, tiny=TINY, only=TINY)
    ahead, first, second = call(), call("only", concurrency=1, retries=1), call("only", concurrency=1)
    for item in (ahead, first, second):
        dispatcher.submit(item)
    assert assigned(dispatcher) == {1: [ahead, first]}
    if how == "cancelled":
        assert isinstance(dispatcher.cancel(first.number, 0.0, Running(first.number, 0.0)), Doom)
        assert assigned(dispatcher) == {}  # it runs until its worker is dead
        dispatcher.worker_lost(1, [first.number], lost)
    elif how == "retried":
        first.backoff = lambda failed: 1.0
        dispatcher.answered(1, Answer(first.number, TINY, None, RAISED), 0.0)
    elif how == "lost":
        dispatcher.worker_lost(1, [first.number], lost)
    elif how == "returned":
        dispatcher.answered(1, Answer(first.number, 0.0, None, Failure(RETURNED, "")), 0.0)
        dispatcher.worker_ready(2, 0.0)
        assert assigned(dispatcher) == {2: [first]}
        done(dispatcher, 2, first)
    else:
        number = first.number
        assert isinstance(dispatcher.cancel(number, 0.0, IDLE), Outcome)
        assert assigned(dispatcher) == {}  # it may start yet
        assert dispatcher.answered(1, Answer(number, TINY, b"1"), 0.0) is None
    dispatcher.worker_ready(3, 0.0)
    assert second in [item for batch in assigned(dispatcher).values() for item in batch]


def test_waiting_limited_calls_can_be_cancelled_and_abandoned() -> None:
    dispatcher = taught(1, only=1.0)
    items = [call("only", concurrency=1, priority=number % 3) for number in range(9)]
    for item in items:
        dispatcher.submit(item)
    (running,) = assigned(dispatcher)[1]
    waiting = [item for item in items if item is not running]
    assert isinstance(dispatcher.cancel(waiting[3].number, 0.0, IDLE), Outcome)
    outcomes = dispatcher.abandon(ShuttingDown("bye"))
    assert {outcome.call for outcome in outcomes} == set(waiting) - {waiting[3]}
    done(dispatcher, 1, running)
    assert empty(dispatcher)


# -- calls that share a run


def keyed(key: str = "a", **options: object) -> Call:
    return call(key=key.encode(), **options)


def ended(dispatcher: Dispatcher, outcome: Outcome | None) -> dict[Call, object]:
    """What has ended with an outcome: result or error of each call."""
    assert outcome is not None
    outcomes = [outcome, *dispatcher.shared]
    dispatcher.shared.clear()
    return {outcome.call: outcome.result or outcome.error for outcome in outcomes}


def test_calls_of_one_key_have_one_run_and_each_its_outcome() -> None:
    dispatcher = taught(2, tiny=1.0)
    first, second, other = keyed(), keyed(), keyed("b")
    for item in (first, second, other):
        dispatcher.submit(item)
    assert dispatcher.queued == len(dispatcher) == 2
    (run,), (alone,) = assigned(dispatcher).values()
    third = keyed()
    dispatcher.submit(third)  # it runs, and can be joined yet
    assert dispatcher.queued == 0
    assert {dispatcher.holder(item.number) for item in (first, second, third, run)} == {1}
    outcome = dispatcher.answered(1, Answer(run.number, 1.0, b"7"), 0.0)
    assert ended(dispatcher, outcome) == {first: b"7", second: b"7", third: b"7"}
    dispatcher.submit(again := keyed())  # nothing is kept of a run that has ended
    (new,) = assigned(dispatcher)[1]
    assert new is again.run is not run
    assert ended(dispatcher, dispatcher.answered(1, Answer(new.number, 1.0, b"8"), 0.0)) == {again: b"8"}
    assert ended(dispatcher, dispatcher.answered(2, Answer(alone.number, 1.0, b"9"), 0.0)) == {other: b"9"}
    assert empty(dispatcher)


def test_a_shared_run_is_retried_and_fails_for_all() -> None:
    dispatcher = taught(1, tiny=1.0)
    first, second = keyed(retries=1), keyed(retries=1)
    for item in (first, second):
        dispatcher.submit(item)
    (run,) = assigned(dispatcher)[1]
    assert dispatcher.answered(1, Answer(run.number, 1.0, None, RAISED), 0.0) is None
    dispatcher.submit(third := keyed())
    dispatcher.due(0.0, idle)
    assert assigned(dispatcher) == {1: [run]}
    outcomes = ended(dispatcher, dispatcher.answered(1, Answer(run.number, 1.0, None, RAISED), 0.0))
    assert outcomes.keys() == {first, second, third}
    assert {type(error) for error in outcomes.values()} == {TaskError}
    assert empty(dispatcher)


def test_a_shared_run_whose_worker_dies_is_paid_for_once() -> None:
    dispatcher = taught(1, tiny=1.0)
    first, second = keyed(crashes=1), keyed(crashes=1)
    for item in (first, second):
        dispatcher.submit(item)
    for worker in (1, 2):
        (run,) = assigned(dispatcher)[worker]
        outcomes = dispatcher.worker_lost(worker, [run.number], lost)
        dispatcher.worker_ready(worker + 1, 0.0)
    (outcome,) = outcomes
    assert {type(error) for error in ended(dispatcher, outcome).values()} == {Poisoned}
    assert first.settled and second.settled and empty(dispatcher)


@pytest.mark.parametrize("state", ["queued", "limited", "held", "running", "backoff"])
def test_a_run_is_given_up_with_the_last_who_wants_it(state: str) -> None:
    dispatcher = taught(1, tiny=1.0)
    options = {"retries": 1, "concurrency": 1 if state == "limited" else None}
    first, second = keyed(**options), keyed(**options)
    for item in (first, second):
        dispatcher.submit(item)
    run = first.run
    assert run is not None
    runs = IDLE
    if state in ("held", "running", "backoff"):
        assert assigned(dispatcher) == {1: [run]}
        runs = Running(run.number, 0.0) if state == "running" else IDLE
    if state == "backoff":
        dispatcher.answered(1, Answer(run.number, 1.0, None, RAISED), 0.0)
    left = dispatcher.cancel(first.number, 0.0, runs)
    assert isinstance(left, Outcome) and left.call is first and isinstance(left.error, CallCancelled)
    assert not run.settled and dispatcher.cancel(first.number, 0.0, runs) is None
    what = dispatcher.cancel(second.number, 0.0, runs)
    if state == "running":
        assert isinstance(what, Doom) and not second.settled
        dispatcher.submit(third := keyed())  # not to a run that is being killed
        assert third.run is not run
        (what,) = dispatcher.worker_lost(1, [run.number], lost)
        dispatcher.worker_ready(2, 0.0)
        (again,) = assigned(dispatcher)[2]
        assert ended(dispatcher, dispatcher.answered(2, Answer(again.number, 1.0, b"1"), 0.0)) == {
            third: b"1"
        }
    assert isinstance(what, Outcome) and what.call is second and isinstance(what.error, CallCancelled)
    if state == "held":
        assert dispatcher.answered(1, Answer(run.number, 1.0, b"1"), 0.0) is None
    assert dispatcher.shared == []
    assert not dispatcher.assigned and assigned(dispatcher) == {}
    assert empty(dispatcher)


def test_each_deadline_ends_its_own_request() -> None:
    dispatcher = taught(1, tiny=1.0)
    items = [keyed(deadline=1.0), keyed(deadline=2.0), keyed(deadline=3.0)]
    for item in items:
        dispatcher.submit(item)
    (run,) = assigned(dispatcher)[1]
    assert run.job().deadline == 3.0
    running = Running(run.number, 0.0)
    for now, item in ((1.0, items[0]), (2.0, items[1])):
        outcomes, dooms = dispatcher.due(now, lambda worker: running)
        assert [(outcome.call, type(outcome.error)) for outcome in outcomes] == [(item, CallTimeout)]
        assert dooms == []
    outcomes, dooms = dispatcher.due(3.0, lambda worker: running)
    assert outcomes == [] and [doom.worker for doom in dooms] == [1]
    (outcome,) = dispatcher.worker_lost(1, [run.number], lost)
    assert outcome.call is items[2] and isinstance(outcome.error, CallTimeout)
    assert empty(dispatcher)


def test_the_deadline_of_who_waits_without_one_is_none() -> None:
    dispatcher = taught(1, tiny=1.0)
    for item in (keyed(deadline=1.0), keyed(), keyed(deadline=9.0)):
        dispatcher.submit(item)
    assert assigned(dispatcher)[1][0].job().deadline is None


@pytest.mark.parametrize("concurrency", [None, 1])
def test_a_higher_priority_lifts_the_run_while_it_waits(concurrency: int | None) -> None:
    dispatcher = taught(1, tiny=1.0)
    first, plain, urgent = keyed(concurrency=concurrency), call(), call(priority=1)
    for item in (first, plain, urgent, keyed(priority=-1), keyed(priority=2), keyed(priority=1)):
        dispatcher.submit(item)
    run = first.run
    assert run is not None and run.priority == 2
    assert assigned(dispatcher) == {1: [run]}
    dispatcher.submit(keyed(priority=3))
    dispatcher.worker_lost(1, (), lost)
    dispatcher.worker_ready(2, 0.0)
    assert assigned(dispatcher) == {2: [run]}
    outcome = dispatcher.answered(2, Answer(run.number, 1.0, b"1"), 0.0)
    assert len(ended(dispatcher, outcome)) == 5
    for expected in (urgent, plain):
        assert assigned(dispatcher) == {2: [expected]}
        done(dispatcher, 2, expected)
    assert empty(dispatcher)


def test_waiting_shared_runs_are_abandoned_for_all() -> None:
    dispatcher = taught(0)
    items = [keyed(), keyed(), keyed("b", concurrency=1)]
    for item in items:
        dispatcher.submit(item)
    outcomes = [*dispatcher.abandon(ShuttingDown("bye")), *dispatcher.shared]
    dispatcher.shared.clear()
    assert {outcome.call for outcome in outcomes} == set(items)
    assert empty(dispatcher)


# -- calls that need a worker of their own


def isolated(**options: object) -> Call:
    return call("alone", isolated=True, **{"concurrency": UNLIMITED, **options})


def replaced(dispatcher: Dispatcher, *ids: int) -> None:
    """What the pool does with spent workers: others take their places."""
    for spent, id in zip(dispatcher.spent, ids, strict=True):
        assert dispatcher.load(spent) == 0
        dispatcher.worker_lost(spent, (), lost)
        dispatcher.worker_ready(id, 0.0)
    dispatcher.spent.clear()


def test_an_isolated_call_gets_a_fresh_worker_which_is_spent_by_it() -> None:
    dispatcher = taught(2, tiny=TINY, alone=TINY)
    for _ in range(2):
        item = call()
        dispatcher.submit(item)
        assert assigned(dispatcher) == {1: [item]}  # and the second worker stays fresh
        done(dispatcher, 1, item)
    alone, behind = isolated(), call()
    dispatcher.submit(alone)
    dispatcher.submit(behind)
    assert assigned(dispatcher) == {2: [alone], 1: [behind]}
    assert dispatcher.spent == []
    done(dispatcher, 2, alone)
    assert dispatcher.spent == [2]
    done(dispatcher, 1, behind)
    assert empty(dispatcher)


def test_an_idle_worker_makes_place_and_calls_behind_pass() -> None:
    dispatcher = used(2)
    alone, behind = isolated(), [call(), call(priority=1)]
    dispatcher.submit(alone)
    dispatcher.submit(behind[0])
    assert assigned(dispatcher) == {2: [behind[0]]}
    assert dispatcher.spent == [1]
    dispatcher.submit(behind[1])
    replaced(dispatcher, 3)
    done(dispatcher, 2, behind[0])
    dispatcher.submit(last := call("unknown", priority=1))
    assert assigned(dispatcher) == {2: [behind[1]], 3: [alone]}  # which was kept for it
    done(dispatcher, 3, alone)
    replaced(dispatcher, 4)
    assert assigned(dispatcher) == {4: [last]}


def test_nobody_passes_an_isolated_call_until_a_worker_is_idle() -> None:
    dispatcher = used(2)
    ahead = [call(), call()]
    for item in ahead:
        dispatcher.submit(item)
    assert assigned(dispatcher) == {1: [ahead[0]], 2: [ahead[1]]}
    alone, behind = isolated(), call()
    for item in (alone, behind):
        dispatcher.submit(item)
    assert assigned(dispatcher) == {} == assigned(dispatcher)
    done(dispatcher, 2, ahead[1])
    assert assigned(dispatcher) == {} and dispatcher.spent == [2]
    done(dispatcher, 1, ahead[0])
    assert assigned(dispatcher) == {1: [behind]}
    replaced(dispatcher, 3)
    assert assigned(dispatcher) == {3: [alone]}


def test_calls_ahead_of_an_isolated_one_go_first() -> None:
    dispatcher = used(1)
    ahead, alone = [call("unknown"), call("unknown", priority=-1)], isolated()
    dispatcher.submit(ahead[0])
    dispatcher.submit(alone)
    dispatcher.submit(ahead[1])
    assert assigned(dispatcher) == {1: [ahead[0]]} and not dispatcher.spent
    done(dispatcher, 1, ahead[0])
    assert assigned(dispatcher) == {} and dispatcher.spent == [1]
    replaced(dispatcher, 2)
    assert assigned(dispatcher) == {2: [alone]}


def test_isolated_calls_run_on_all_workers_at_a_time() -> None:
    dispatcher = used(4)
    items = [isolated(concurrency=3) for _ in range(6)]
    for item in items:
        dispatcher.submit(item)
    assert assigned(dispatcher) == {} and len(dispatcher.spent) == 3
    replaced(dispatcher, 5, 6, 7)
    batches = assigned(dispatcher)
    assert sorted(batches) == [5, 6, 7] and dispatcher.spent == []
    assert [item for batch in batches.values() for item in batch] == items[:3]
    dispatcher.submit(plain := call())
    assert assigned(dispatcher) == {4: [plain]}


def test_what_was_kept_for_an_isolated_call_that_left_is_everybodys() -> None:
    dispatcher = used(1)
    dispatcher.submit(alone := isolated())
    assert assigned(dispatcher) == {} and dispatcher.spent == [1]
    assert isinstance(dispatcher.cancel(alone.number, 0.0, IDLE), Outcome)
    replaced(dispatcher, 2)
    dispatcher.submit(plain := call())
    assert assigned(dispatcher) == {2: [plain]}
    done(dispatcher, 2, plain)
    assert dispatcher.spent == [] and empty(dispatcher)


def test_a_kept_worker_that_dies_is_not_waited_for() -> None:
    dispatcher = used(1)
    dispatcher.submit(alone := isolated())
    assert assigned(dispatcher) == {}
    replaced(dispatcher, 2)
    dispatcher.retire(2)
    assert assigned(dispatcher) == {}
    dispatcher.worker_lost(2, (), lost)
    dispatcher.worker_ready(3, 0.0)
    assert assigned(dispatcher) == {3: [alone]}


def used(workers: int) -> Dispatcher:
    """A dispatcher whose workers have all run something, and that knows what calls take."""
    dispatcher = taught(workers, tiny=WINDOW, alone=WINDOW)
    items = [call() for _ in range(workers)]
    for item in items:
        dispatcher.submit(item)
    for id, (item,) in assigned(dispatcher).items():
        done(dispatcher, id, item, WINDOW)
    return dispatcher


# -- memory


def test_what_takes_too_much_is_killed_while_it_runs() -> None:
    dispatcher = taught(1, tiny=1.0)
    item = call(max_memory=1000, timeout=math.inf)
    dispatcher.submit(item)
    assert assigned(dispatcher) == {1: [item]}
    assert dispatcher.gauged == [1]
    looks: list[int] = []

    def taken(worker: int, limit: int) -> int:
        looks.append(worker)
        return 1000 if len(looks) < 3 else 2_500_000

    now, running = 0.0, IDLE
    dooms: list[Doom] = []
    while not dooms:
        due = dispatcher.next_deadline()
        assert due is not None and now < due <= now + MEMORY_CHECK
        now = due
        outcomes, dooms = dispatcher.due(now, lambda worker, runs=running: runs, taken)
        assert outcomes == []
        assert bool(looks) == (running is not IDLE)  # what has not begun takes nothing
        running = Running(item.number, 0.0)
    assert len(looks) == 3
    (outcome,) = dispatcher.worker_lost(1, [item.number], lost)
    assert isinstance(outcome.error, TaskError) and outcome.error.type == "MemoryError"
    assert outcome.error.receipt == {"attempt": 1, "max_memory": 1000, "taken": 2_500_000}
    assert empty(dispatcher)


def test_a_time_limit_holds_beside_that_of_memory() -> None:
    dispatcher = taught(1, tiny=1.0)
    item = call(max_memory=1000, timeout=0.01)
    dispatcher.submit(item)
    assigned(dispatcher)
    _, (doom,) = dispatcher.due(0.01, lambda worker: Running(item.number, 0.0))
    assert isinstance(doom.error, CallTimeout)


@pytest.mark.parametrize("held", [0, 1])
def test_a_worker_that_has_outgrown_its_limit_is_spent_between_calls(held: int) -> None:
    dispatcher = taught(2, tiny=WINDOW)
    items = [call() for _ in range(2 * held)]
    for item in items:
        dispatcher.submit(item)
    assigned(dispatcher)
    assert dispatcher.answered(1, Answer(0, 0.0, None, Failure(OUTGROWN, "")), 0.0) is None
    assert dispatcher.spent == ([] if held else [1])
    dispatcher.submit(behind := call())
    if held:
        done(dispatcher, 1, items[0])
        assert dispatcher.spent == [1] and assigned(dispatcher) == {}
        done(dispatcher, 2, items[1])
    assert assigned(dispatcher) == {2: [behind]}
    assert dispatcher.answered(1, Answer(0, 0.0, None, Failure(OUTGROWN, "")), 0.0) is None
    assert dispatcher.spent == [1]


# -- workers that run so many calls and no more


def test_a_worker_gets_what_it_may_run_and_is_then_spent() -> None:
    dispatcher = Dispatcher(max_tasks=3)
    dispatcher._predicted["tiny"] = TINY
    dispatcher.worker_ready(1, 0.0)
    calls = [call() for _ in range(5)]
    for item in calls:
        dispatcher.submit(item)
    assert assigned(dispatcher) == {1: calls[:3]}
    done(dispatcher, 1, calls[0])
    assert dispatcher.answered(1, Answer(calls[2].number, 0.0, None, Failure(RETURNED, "")), 0.0) is None
    done(dispatcher, 1, calls[1])
    assert assigned(dispatcher) == {1: [calls[2]]} and dispatcher.spent == []  # it had not begun that one
    done(dispatcher, 1, calls[2])
    assert dispatcher.spent == [1] and assigned(dispatcher) == {}
    dispatcher.worker_lost(1, (), lost)
    dispatcher.worker_ready(2, 0.0)
    assert assigned(dispatcher) == {2: calls[3:]}


def test_a_worker_that_is_killed_anyway_is_not_spent() -> None:
    dispatcher = Dispatcher(max_tasks=1)
    dispatcher.worker_ready(1, 0.0)
    dispatcher.submit(item := call())
    assigned(dispatcher)
    assert isinstance(dispatcher.cancel(item.number, 0.0, Running(item.number, 0.0)), Doom)
    dispatcher.answered(1, Answer(item.number, 0.0, b"1"), 0.0)
    assert dispatcher.spent == []


# -- ends


def test_a_raised_error_is_tried_again_after_its_backoff() -> None:
    dispatcher = taught(1, tiny=0.0001)
    item = call(retries=2, backoff=lambda failed: float(failed))
    dispatcher.submit(item)
    numbers = []
    for now, after in ((0.0, 1.0), (1.0, 3.0)):
        assert assigned(dispatcher, now) == {1: [item]}
        numbers.append(item.number)
        assert dispatcher.answered(1, Answer(item.number, 0.1, None, RAISED), now) is None
        assert dispatcher.queued == 1 and assigned(dispatcher, now) == {}
        assert dispatcher.next_deadline() == after
        assert dispatcher.due(after, idle) == ([], [])
    assert assigned(dispatcher, 3.0) == {1: [item]} and item.job().attempt == 3
    outcome = dispatcher.answered(1, Answer(item.number, 0.1, None, RAISED), 3.0)
    assert outcome and isinstance(outcome.error, TaskError) and str(outcome.error) == "ValueError: no"
    assert len({*numbers, item.number}) == 3 and empty(dispatcher)


def test_an_error_that_is_not_for_retrying_ends_the_call() -> None:
    dispatcher = taught(1, tiny=0.0001)
    dispatcher.submit(item := call(retries=2))
    assigned(dispatcher)
    outcome = dispatcher.answered(1, Answer(item.number, 0.1, None, FATAL), 0.0)
    assert outcome and isinstance(outcome.error, TaskError)


def test_only_the_call_that_ran_pays_for_a_death() -> None:
    dispatcher = taught(1, tiny=0.0001)
    calls = [call(crashes=0) for _ in range(3)]
    for item in calls:
        dispatcher.submit(item)
    assigned(dispatcher)
    (outcome,) = dispatcher.worker_lost(1, [calls[1].number], lost)
    assert outcome.call is calls[1] and isinstance(outcome.error, WorkerLost)
    assert outcome.error.receipt == {"attempt": 1}
    assert [item.crashed for item in calls] == [0, 1, 0]
    assert dispatcher.worker_lost(1, [calls[0].number], lost) == []


def test_a_call_that_keeps_killing_is_poisoned() -> None:
    dispatcher = taught(1, tiny=0.0001)
    dispatcher.submit(item := call(crashes=1))
    for id in (1, 2):
        dispatcher.worker_ready(id, 0.0)
        assert assigned(dispatcher) == {id: [item]}
        outcomes = dispatcher.worker_lost(id, [item.number], lost)
    (outcome,) = outcomes
    assert isinstance(outcome.error, Poisoned) and outcome.error.receipt == {"attempt": 2}
    assert empty(dispatcher)


def test_late_and_repeated_answers_match_nothing() -> None:
    dispatcher = taught(1, tiny=0.0001)
    dispatcher.submit(item := call())
    assigned(dispatcher)
    old = item.number
    dispatcher.worker_lost(1, (), lost)
    assert dispatcher.answered(1, Answer(old, 0.1, b"1"), 0.0) is None
    dispatcher.worker_ready(2, 0.0)
    assigned(dispatcher)
    assert dispatcher.answered(2, Answer(old, 0.1, b"1"), 0.0) is None
    assert dispatcher.answered(3, Answer(item.number, 0.1, b"1"), 0.0) is None
    done(dispatcher, 2, item)
    assert dispatcher.answered(2, Answer(item.number, 0.1, b"1"), 0.0) is None
    assert empty(dispatcher)


def test_cancel_while_queued_waiting_in_a_window_running_and_ended() -> None:
    dispatcher = taught(1, tiny=0.0001)
    running, held = call(), call()
    for item in (running, held):
        dispatcher.submit(item)
    assigned(dispatcher)
    dispatcher.submit(queued := call())
    runs = Running(running.number, 0.0)
    for item in (queued, held):
        outcome = dispatcher.cancel(item.number, 0.0, runs)
        assert isinstance(outcome, Outcome) and isinstance(outcome.error, CallCancelled)
        assert dispatcher.cancel(item.number, 0.0, runs) is None
    why = ShuttingDown("bye")
    assert dispatcher.cancel(running.number, 0.0, runs, why) == Doom(1, why)
    assert len(dispatcher) == 1
    (ended,) = dispatcher.worker_lost(1, [running.number], lost)
    assert ended.call is running and ended.error is why
    assert empty(dispatcher)


def test_a_doomed_call_that_ends_in_the_last_moment_does_not_run_again() -> None:
    for how in ("answer lost", "raised", "next one runs"):
        dispatcher = taught(1, tiny=0.0001)
        doomed, behind = call(retries=3, crashes=3), call()
        for item in (doomed, behind):
            dispatcher.submit(item)
        assigned(dispatcher)
        assert isinstance(dispatcher.cancel(doomed.number, 0.0, Running(doomed.number, 0.0)), Doom)
        if how == "raised":
            outcome = dispatcher.answered(1, Answer(doomed.number, 0.1, None, RAISED), 0.0)
            assert outcome and isinstance(outcome.error, CallCancelled)
        outcomes = dispatcher.worker_lost(1, [behind.number if how == "next one runs" else 0], lost)
        if how != "raised":
            assert [outcome.call for outcome in outcomes] == [doomed]
            assert isinstance(outcomes[0].error, CallCancelled)
        assert dispatcher.queued == 1 and behind.attempt == 1


def test_two_calls_may_doom_the_same_worker() -> None:
    dispatcher = taught(1, tiny=0.0001)
    calls = [call(), call()]
    for item in calls:
        dispatcher.submit(item)
    assigned(dispatcher)
    for item in calls:
        assert isinstance(dispatcher.cancel(item.number, 0.0, Running(item.number, 0.0)), Doom)
    outcomes = dispatcher.worker_lost(1, [calls[1].number], lost)
    assert [type(outcome.error) for outcome in outcomes] == [CallCancelled, CallCancelled]
    assert empty(dispatcher)


def test_cancelled_calls_do_not_pile_up_in_a_queue_that_nobody_takes_from() -> None:
    dispatcher = Dispatcher()
    dispatcher.submit(call())
    for priority in range(1000):
        number = dispatcher.submit(call(priority=priority % 7))
        dispatcher.cancel(number, 0.0, IDLE)
        assert sum(map(len, dispatcher._queues.values())) <= 3
    assert dispatcher.queued == 1


def test_abandon_ends_what_is_queued_and_no_more() -> None:
    dispatcher = taught(1, tiny=0.0001)
    held, retried, queued = call(), call(retries=1, backoff=lambda failed: 9.0), call("unknown")
    for item in (held, retried):
        dispatcher.submit(item)
    assigned(dispatcher)
    dispatcher.answered(1, Answer(retried.number, 0.1, None, RAISED), 0.0)
    dispatcher.submit(queued)
    outcomes = dispatcher.abandon(WorkerLost("no more"))
    assert {outcome.call for outcome in outcomes} == {retried, queued}
    assert dispatcher.queued == 0 and dispatcher.next_deadline() is None
    done(dispatcher, 1, held)
    assert empty(dispatcher)


# -- time


def test_a_deadline_counts_while_queued_too() -> None:
    dispatcher = Dispatcher()
    dispatcher.submit(item := call(deadline=5.0))
    assert dispatcher.next_deadline() == 5.0
    assert dispatcher.due(4.9, idle) == ([], [])
    ((outcome,), dooms) = dispatcher.due(5.0, idle)
    assert outcome.call is item and isinstance(outcome.error, CallTimeout) and not dooms
    assert empty(dispatcher)


def test_a_limit_counts_from_when_the_worker_began() -> None:
    dispatcher = taught(1, tiny=0.0001)
    dispatcher.submit(item := call(timeout=1.0))
    assigned(dispatcher)
    assert dispatcher.due(1.0, idle) == ([], [])  # it waits behind another
    assert dispatcher.next_deadline() == 1.0 + OVERDUE_CHECK
    began = Running(item.number, 1.01)
    assert dispatcher.due(1.5, lambda id: began) == ([], [])
    assert dispatcher.next_deadline() == 2.01
    outcomes, (doom,) = dispatcher.due(2.01, lambda id: began)
    assert not outcomes and doom.worker == 1 and isinstance(doom.error, CallTimeout)
    assert dispatcher.next_deadline() is None  # it does not spin while the worker dies
    (ended,) = dispatcher.worker_lost(1, [item.number], lost)
    assert ended.error is doom.error and item.crashed == 0


def test_a_given_up_call_that_starts_and_lasts_costs_its_worker() -> None:
    dispatcher = taught(1, tiny=0.0001)
    given_up, other = call(), call()
    for item in (given_up, other):
        dispatcher.submit(item)
    assigned(dispatcher)
    assert isinstance(dispatcher.cancel(given_up.number, 0.0, IDLE), Outcome)
    began = Running(given_up.number, 0.01)
    assert dispatcher.due(OVERDUE_CHECK, lambda id: began) == ([], [])
    outcomes, (doom,) = dispatcher.due(0.01 + OVERDUE_CHECK, lambda id: began)
    assert not outcomes and doom.worker == 1
    assert dispatcher.worker_lost(1, [given_up.number], lost) == []
    assert dispatcher.queued == 1 and other.attempt == 1 and len(dispatcher) == 1


# -- streams

URL = "unix:///s.sock"


def streaming(dispatcher: Dispatcher, item: Call, worker: int = 1, now: float = 0.0) -> None:
    """A call that has been sent says that it streams."""
    outcome = dispatcher.answered(worker, Answer(item.number, 0.0, None, stream=URL), now)
    assert outcome is not None and outcome.call is item and item.streaming
    assert (outcome.stream, outcome.result, outcome.error) == (URL, None, None)


def test_a_stream_has_an_outcome_when_it_begins_and_one_when_it_ends() -> None:
    dispatcher = taught(2, tiny=TINY)
    stream, behind = call("stream"), [call() for _ in range(3)]
    dispatcher.submit(stream)
    assert assigned(dispatcher) == {1: [stream]}
    streaming(dispatcher, stream)
    assert dispatcher.assigned == 1 and len(dispatcher) == 1
    dispatcher.worker_lost(2, (), lost)
    for item in behind:
        dispatcher.submit(item)
    assert assigned(dispatcher) == {}, "nothing waits behind a stream"
    outcome = dispatcher.answered(1, Answer(stream.number, 9.0, None), 9.0)
    assert outcome and (outcome.stream, outcome.result, outcome.error) == (None, None, None)
    assert dispatcher.answered(1, Answer(stream.number, 9.0, None), 9.0) is None
    assert assigned(dispatcher, 9.0) == {1: behind}


def test_how_long_a_stream_takes_is_not_learned() -> None:
    dispatcher = taught()
    for _ in range(3):
        stream = call("stream")
        dispatcher.submit(stream)
        assert assigned(dispatcher) == {1: [stream]}
        streaming(dispatcher, stream)
        assert dispatcher.answered(1, Answer(stream.number, TINY, None), 0.0)
    assert dispatcher.predicted("stream") is None


def test_the_deadline_is_met_when_a_stream_begins_and_the_limit_is_not() -> None:
    dispatcher = taught()
    stream = call("stream", deadline=1.0, timeout=5.0)
    dispatcher.submit(stream)
    assigned(dispatcher)
    streaming(dispatcher, stream)
    runs = Running(stream.number, 0.0)
    assert dispatcher.due(1.5, lambda _: runs) == ([], [])
    assert dispatcher.next_deadline() == 5.0
    _, (doom,) = dispatcher.due(5.0, lambda _: runs)
    assert doom.worker == 1 and isinstance(doom.error, CallTimeout)
    (outcome,) = dispatcher.worker_lost(1, [stream.number], lost)
    assert outcome.error is doom.error and empty(dispatcher)


@pytest.mark.parametrize("failure", [RAISED, FATAL])
def test_a_stream_that_fails_is_not_tried_again(failure: Failure) -> None:
    dispatcher = taught()
    stream = call("stream", retries=5)
    dispatcher.submit(stream)
    assigned(dispatcher)
    streaming(dispatcher, stream)
    outcome = dispatcher.answered(1, Answer(stream.number, 1.0, None, failure), 1.0)
    assert outcome and isinstance(outcome.error, TaskError) and empty(dispatcher)


def test_a_call_that_fails_before_it_streams_is_tried_again() -> None:
    dispatcher = taught()
    stream = call("stream", retries=1)
    dispatcher.submit(stream)
    assigned(dispatcher)
    assert dispatcher.answered(1, Answer(stream.number, 0.0, None, RAISED), 0.0) is None
    dispatcher.due(0.0, idle)
    assert assigned(dispatcher) == {1: [stream]}
    streaming(dispatcher, stream)


@pytest.mark.parametrize("seen_running", [True, False])
def test_a_stream_ends_with_its_worker(seen_running: bool) -> None:
    dispatcher = taught()
    stream = call("stream", crashes=5)
    dispatcher.submit(stream)
    assigned(dispatcher)
    streaming(dispatcher, stream)
    (outcome,) = dispatcher.worker_lost(1, [stream.number if seen_running else 0], lost)
    assert type(outcome.error) is WorkerLost and outcome.error.receipt == {"attempt": 1}
    assert empty(dispatcher)


def test_a_cancelled_stream_ends_with_its_worker() -> None:
    dispatcher = taught()
    stream = call("stream")
    dispatcher.submit(stream)
    assigned(dispatcher)
    streaming(dispatcher, stream)
    doom = dispatcher.cancel(stream.number, 1.0, Running(stream.number, 0.0))
    assert isinstance(doom, Doom) and doom.worker == 1
    (outcome,) = dispatcher.worker_lost(1, [stream.number], lost)
    assert isinstance(outcome.error, CallCancelled) and empty(dispatcher)


def test_a_stream_that_its_consumer_has_left_is_killed_if_it_still_runs() -> None:
    dispatcher = taught()
    stream = call("stream", timeout=100.0)
    dispatcher.submit(stream)
    assigned(dispatcher)
    streaming(dispatcher, stream)
    left = Answer(stream.number, 0.0, None, Failure(ABANDONED, ""))
    assert dispatcher.answered(1, left, 3.0) is None
    assert dispatcher.next_deadline() == 3.0
    _, (doom,) = dispatcher.due(3.0, lambda _: Running(stream.number, 0.0))
    assert doom.worker == 1 and isinstance(doom.error, CallCancelled)
    (outcome,) = dispatcher.worker_lost(1, [stream.number], lost)
    assert outcome.error is doom.error and empty(dispatcher)


def test_a_stream_that_its_consumer_has_left_may_have_ended_meanwhile() -> None:
    dispatcher = taught()
    stream = call("stream")
    dispatcher.submit(stream)
    assigned(dispatcher)
    streaming(dispatcher, stream)
    dispatcher.answered(1, Answer(stream.number, 0.0, None, Failure(ABANDONED, "")), 3.0)
    assert dispatcher.due(3.0, idle) == ([], [])
    assert dispatcher.answered(1, Answer(stream.number, 1.0, None, FATAL), 3.001)
    assert empty(dispatcher) and dispatcher.next_deadline() is None


def test_a_call_that_nobody_waits_for_does_not_begin_to_stream() -> None:
    dispatcher = taught()
    given_up, doomed = call("stream"), call("stream")
    for item in (given_up, doomed):
        dispatcher.submit(item)
        assigned(dispatcher)
        what = dispatcher.cancel(item.number, 0.0, Running(item.number if item is doomed else 0, 0.0))
        assert isinstance(what, Doom) == (item is doomed)
        assert dispatcher.answered(1, Answer(item.number, 0.0, None, stream=URL), 0.0) is None
        if item is given_up:
            assert dispatcher.answered(1, Answer(item.number, 0.0, None), 0.0) is None
    assert dispatcher.answered(9, Answer(1, 0.0, None, stream=URL), 0.0) is None
    assert dispatcher.answered(1, Answer(10**6, 0.0, None, stream=URL), 0.0) is None
    assert [outcome.call for outcome in dispatcher.worker_lost(1, [doomed.number], lost)] == [doomed]
    assert empty(dispatcher)


# -- everything at once


class Child:
    """What a worker process does: takes calls in order, one at a time or all that overlap; its answers travel
    for a while.
    """

    def __init__(self) -> None:
        self.waiting: deque[int] = deque()
        self.running: dict[int, float] = {}
        self.asked: set[int] = set()
        self.overlaps = False
        self.answers: deque[Answer] = deque()
        self.doomed = False
        self.given = 0
        self.isolated = False
        self.spent = False


COSTS = {
    "free": 0.0,
    "tiny": 0.0001,
    "short": 0.0015,
    "long": 1.0,
    "brief co": 0.05,
    "co": 0.2,
    "long co": 5.0,
}
LIMITS = {"short": 1, "tiny": 3, "co": 3}
ISOLATED = {"free", "short"}
ENDS = {"result": (b"1", None), "raised": (None, RAISED), "fatal": (None, FATAL)}


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher(max_window=6, overlap=5)
        self.now = 100.0
        self.children: dict[int, Child] = {}
        self.count = 0
        self.calls: list[Call] = []
        self.limited = False
        self.isolating = False
        self.ended: dict[Call, Outcome] = {}
        self.said: list[tuple[int, Answer]] = []
        self.streamed: set[Call] = set()

    def take(self, outcomes: Iterable[Outcome]) -> None:
        outcomes = [*outcomes, *self.dispatcher.shared]
        self.dispatcher.shared.clear()
        for outcome in outcomes:
            assert outcome.call in self.calls and outcome.call not in self.ended
            if outcome.stream is not None:
                assert (outcome.stream, outcome.result, outcome.error) == (URL, None, None)
                assert outcome.call not in self.streamed
                self.streamed.add(outcome.call)
                continue
            assert (outcome.result is None) != (outcome.error is None)
            self.ended[outcome.call] = outcome

    def runs(self, number: int) -> Running:
        for child in self.children.values():
            if number in child.running:
                return Running(number, child.running[number])
        return IDLE

    def obey(self, dooms: Iterable[Doom | Plea]) -> None:
        for doom in dooms:
            child = self.children[doom.worker]
            if isinstance(doom, Doom):
                child.doomed = True
            else:
                assert doom.call in child.running and child.overlaps and doom.call not in child.asked
                child.asked.add(doom.call)

    def some(self, pick: int) -> int | None:
        return sorted(self.children)[pick % len(self.children)] if self.children else None

    # rules

    @initialize(
        workers=st.integers(0, 3),
        limited=st.booleans(),
        isolating=st.booleans(),
        max_tasks=st.sampled_from([None, None, 1, 5]),
    )
    def start(self, workers: int, limited: bool, isolating: bool, max_tasks: int | None) -> None:
        self.limited = limited
        self.isolating = isolating
        self.dispatcher.max_tasks = max_tasks
        for _ in range(workers):
            self.ready()

    @rule(
        task=st.sampled_from(sorted(COSTS)),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        timeout=st.sampled_from([None, None, 0.01, 1.0]),
        deadline=st.sampled_from([None, None, -1.0, 0.05, 2.0]),
        retries=st.integers(0, 2),
        crashes=st.integers(0, 2),
        backoff=st.sampled_from([None, 0.0, 0.5]),
        count=st.sampled_from([1, 1, 4]),
        key=st.sampled_from([None, None, None, b"a", b"b"]),
    )
    def submit(
        self,
        task: str,
        priority: int,
        timeout: float | None,
        deadline: float | None,
        retries: int,
        crashes: int,
        backoff: float | None,
        count: int,
        key: bytes | None,
    ) -> None:
        isolated = self.isolating and task in ISOLATED
        overlaps = "co" in task.split()
        in_lane = isolated or overlaps
        for _ in range(count):
            new = Call(
                task,
                None,
                priority=priority,
                timeout=timeout,
                deadline=None if deadline is None else self.now + deadline,
                retries=retries,
                crashes=crashes,
                backoff=None if backoff is None else lambda failed: backoff,
                concurrency=(LIMITS if self.limited else {}).get(task, UNLIMITED if in_lane else None),
                overlaps=overlaps,
                key=key,
                isolated=isolated,
            )
            self.calls.append(new)
            assert self.dispatcher.submit(new) == new.number

    @precondition(lambda self: len(self.children) < 4)
    @rule()
    def ready(self) -> None:
        self.count += 1
        self.children[self.count] = Child()
        self.dispatcher.worker_ready(self.count, self.now)

    @rule()
    def assign(self) -> None:
        for worker, calls in self.dispatcher.assign(self.now):
            child = self.children[worker]
            assert calls and not child.doomed and not child.isolated
            if any(item.isolated for item in calls):
                assert len(calls) == 1 and not child.given
                child.isolated = True
            for item in calls:
                assert item not in self.ended and item not in self.streamed
                assert item.job().attempt == item.failed + item.crashed + 1
                assert all(item.number not in other.waiting for other in self.children.values())
                assert not (child.waiting or child.running) or child.overlaps == item.overlaps
                child.overlaps = item.overlaps
                child.waiting.append(item.number)
                child.given += 1
            assert child.given <= (self.dispatcher.max_tasks or child.given)
            held = self.dispatcher._workers[worker].calls.values()
            assert len({item.overlaps for item in held}) == 1
            if child.overlaps:
                assert len(held) <= 5
            else:
                assert len(held) <= 6
                assert len(held) == 1 or sum(item.cost for item in held) <= self.dispatcher.window * 1.000001
        self.replace_spent()

    def replace_spent(self) -> None:
        for spent in self.dispatcher.spent:
            child = self.children[spent]
            assert not self.dispatcher.load(spent) and not child.waiting
            assert self.isolating or child.given == self.dispatcher.max_tasks
            child.doomed = child.spent = True  # the pool has it replaced
        self.dispatcher.spent.clear()

    @rule(pick=st.integers(0, 3))
    def begin(self, pick: int) -> None:
        worker = self.some(pick)
        if worker is None or not (child := self.children[worker]).waiting:
            return
        if child.overlaps or not child.running:
            child.running[child.waiting.popleft()] = self.now

    @rule(
        pick=st.integers(0, 3),
        which=st.integers(0, 4),
        end=st.sampled_from(sorted(ENDS)),
        arrives=st.booleans(),
    )
    def finish(self, pick: int, which: int, end: str, arrives: bool) -> None:
        self.begin(pick)
        worker = self.some(pick)
        if worker is None or not (child := self.children[worker]).running:
            return
        number = sorted(child.running)[which % len(child.running)]
        del child.running[number]
        child.asked.discard(number)
        item = self.dispatcher.call(number)
        child.answers.append(Answer(number, COSTS[item.task] if item else 0.5, *ENDS[end]))
        if arrives:
            self.deliver(worker)

    @rule(pick=st.integers(0, 3), stream=st.sampled_from([URL, URL, None]))
    def stream(self, pick: int, stream: str | None) -> None:
        """What runs says that it streams, or that nobody consumes that."""
        self.begin(pick)
        worker = self.some(pick)
        if worker is not None and (child := self.children[worker]).running and not child.overlaps:
            item = self.dispatcher.call(min(child.running))
            if item is not None and item.key is not None:
                return  # no task that streams has a key
            failure = None if stream else Failure(ABANDONED, "")
            child.answers.append(Answer(min(child.running), 0.0, None, failure, stream))

    def deliver(self, worker: int) -> None:
        answers = self.children[worker].answers
        while answers:
            answer = answers.popleft()
            self.said.append((worker, answer))
            outcome = self.dispatcher.answered(worker, answer, self.now)
            self.take([outcome] if outcome else [])
        self.replace_spent()

    @rule(pick=st.integers(0, 3))
    def arrive(self, pick: int) -> None:
        worker = self.some(pick)
        if worker is not None:
            self.deliver(worker)

    @precondition(lambda self: self.said)
    @rule(pick=st.integers(0, 1000), elsewhere=st.booleans())
    def repeat(self, pick: int, elsewhere: bool) -> None:
        worker, answer = self.said[pick % len(self.said)]
        if elsewhere and self.children:
            worker = sorted(self.children)[pick % len(self.children)]
        assert self.dispatcher.answered(worker, answer, self.now) is None

    @rule(pick=st.integers(0, 3))
    def give_back(self, pick: int) -> None:
        worker = self.some(pick)
        if worker is not None:
            child = self.children[worker]
            while child.waiting:
                child.given -= 1
                child.isolated = False
                child.answers.append(Answer(child.waiting.pop(), 0.0, None, Failure(RETURNED, "")))

    @rule(pick=st.integers(0, 3), seen=st.booleans(), nonsense=st.sampled_from([None, None, 0, 10**9]))
    def lose(self, pick: int, seen: bool, nonsense: int | None) -> None:
        worker = self.some(pick)
        if worker is None:
            return
        if seen:
            self.deliver(worker)
        child = self.children.pop(worker)
        running = list(child.running) if nonsense is None else [nonsense]
        ran = {self.dispatcher.call(number) for number in child.running} if nonsense is None else set()
        asked = {self.dispatcher.call(number) for number in child.asked}
        before = {call: call.crashed for call in self.calls}
        streams = {call for call in self.streamed if self.dispatcher.holder(call.number) == worker}
        ended = self.dispatcher.worker_lost(worker, running, lost)
        self.take(ended)
        assert all(outcome.error and outcome.error.receipt for outcome in ended)
        charged = {call for call in self.calls if call.crashed != before[call]}
        assert charged <= ran - asked | streams
        assert not (child.doomed and charged - streams)
        if child.spent:
            self.ready()

    @precondition(lambda self: self.calls)
    @rule(pick=st.integers(0, 1000), last=st.booleans())
    def cancel(self, pick: int, last: bool) -> None:
        item = self.calls[-1 - pick % 3 if last and len(self.calls) > 2 else pick % len(self.calls)]
        holder = self.dispatcher.holder(item.number)
        number = self.dispatcher.run(item.number)
        runs = self.runs(number)
        alone = item.run is None or len(item.run.sharers or ()) == 1
        asked = holder is not None and alone and number in self.children[holder].asked
        what = self.dispatcher.cancel(item.number, self.now, runs)
        if isinstance(what, Doom | Plea):
            assert runs.call == (item.run or item).number and item not in self.ended
            assert isinstance(what, Plea) == item.overlaps
            self.obey([what])
        else:
            assert (what is None) == (item in self.ended or asked)
            self.take([what] if what else [])

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.004, 0.02, 0.5, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        outcomes, dooms = self.dispatcher.due(self.now, self.runs)
        self.take(outcomes)
        self.obey(dooms)
        due = self.dispatcher.next_deadline()
        assert due is None or due > self.now

    @rule(pick=st.integers(0, 3))
    def retire(self, pick: int) -> None:
        worker = self.some(pick)
        if worker is not None and len(self.children) > 2:
            self.dispatcher.retire(worker)

    # what always holds

    @invariant()
    def counters_are_real(self) -> None:
        dispatcher = self.dispatcher
        held = [item for worker in dispatcher._workers.values() for item in worker.calls.values()]
        assert dispatcher.assigned == len(held) == len(dispatcher._holder)
        waiting = [item for queue in dispatcher._queues.values() for item in queue]
        live = [item for item in waiting if not item.settled]
        stale = len(waiting) - len(live)
        live += dispatcher._lanes.waiting() + dispatcher._overlapping.waiting()
        assert dispatcher.queued == len(live) + len(dispatcher._backoff)
        assert dispatcher._stale == stale
        unfinished = [item for item in self.calls if item not in self.ended]
        assert len(dispatcher) == len({item.run or item for item in unfinished})
        assert dispatcher._sharing.members.keys() == {item.number for item in unfinished if item.key}
        assert dispatcher.shared == []
        assert len({id(item) for item in (*held, *live)}) == len(held) + len(live)

    @invariant()
    def limits_hold(self) -> None:
        held = Counter(
            item.task for worker in self.dispatcher._workers.values() for item in worker.calls.values()
        )
        both = (self.dispatcher._lanes, self.dispatcher._overlapping)
        waiting = {item.task for lanes in both for item in lanes.waiting()}
        for task, limit in LIMITS.items() if self.limited else ():
            assert held[task] <= limit
            lanes = self.dispatcher._overlapping if task == "co" else self.dispatcher._lanes
            assert (task in lanes.open) == (task in waiting and held[task] < limit)

    @invariant()
    def a_stream_stays_where_it_is(self) -> None:
        for item in self.streamed:
            assert item in self.ended or self.dispatcher.holder(item.number) is not None

    @invariant()
    def loads_are_those_of_the_calls(self) -> None:
        for worker in self.dispatcher._workers.values():
            real = sum(item.cost for item in worker.calls.values())
            assert worker.load >= real * 0.999999 - 1e-9
            assert worker.calls or worker.load == 0.0
            if worker.overlaps:
                assert worker.load == real
            assert set(worker.asked) <= set(worker.calls)

    def teardown(self) -> None:
        self.ready()
        for _ in range(20 * (len(self.calls) + 1)):
            if empty(self.dispatcher):
                break
            if all(worker.retiring for worker in self.dispatcher._workers.values()):
                self.ready()
            self.pass_time(1.0)
            self.assign()
            for pick, worker in enumerate(sorted(self.children)):
                if self.children[worker].doomed:
                    self.lose(pick, True, None)
                    break
                self.deliver(worker)
                self.finish(pick, 0, "result", True)
        assert empty(self.dispatcher)
        assert set(self.ended) == set(self.calls)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
