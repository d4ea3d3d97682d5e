"""The restart budget: free after a single death, slower with each, a whole period when it is spent."""

from workers.restarts import RestartBudget


def test_a_single_death_is_free_and_more_are_not() -> None:
    budget = RestartBudget(5, 10.0, first_pause=0.02)
    pauses = [budget.pause(0.0)]
    for _ in range(5):
        budget.note(0.0)
        pauses.append(budget.pause(0.0))
    assert pauses == [0.0, 0.0, 0.02, 0.04, 0.08, 0.16]
    assert not budget.exhausted(0.0)


def test_pauses_have_a_ceiling() -> None:
    budget = RestartBudget(100)
    for _ in range(100):
        budget.note(0.0)
    assert budget.pause(0.0) == 1.0


def test_exhausted_until_the_last_death_is_a_period_ago() -> None:
    budget = RestartBudget(3, 10.0)
    for now in (0.0, 1.0, 2.0, 3.0):
        assert not budget.exhausted(now)
        budget.note(now)
    assert budget.exhausted(3.0) and budget.pause(3.0) == 10.0
    assert budget.exhausted(12.9)
    assert not budget.exhausted(13.0)
    assert budget.pause(13.0) == 0.0


def test_workers_that_take_long_to_die_are_a_loop_too() -> None:
    budget = RestartBudget(10, 10.0)
    now = 0.0
    for _ in range(11):
        assert not budget.exhausted(now)
        now += budget.pause(now) + 5.0  # loading large modules, say
        budget.note(now)
    assert budget.exhausted(now)


def test_deaths_far_apart_never_count_together() -> None:
    budget = RestartBudget(1, 10.0)
    for day in range(1000):
        budget.note(day * 11.0)
        assert not budget.exhausted(day * 11.0) and budget.pause(day * 11.0) == 0.0


def test_a_worker_that_works_ends_the_count() -> None:
    budget = RestartBudget(2)
    for _ in range(3):
        budget.note(0.0)
    assert budget.exhausted(0.0)
    budget.recovered()
    assert not budget.exhausted(0.0) and budget.pause(0.0) == 0.0
