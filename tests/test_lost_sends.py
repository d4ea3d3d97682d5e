"""Workers that take nothing any more: ZeroMQ would take calls for them without end, and lose them unsaid."""

from __future__ import annotations

import os
import signal

import pytest
from test_pool import add
from test_pool_limits import driven

from workers.assigning import MAX_WINDOW

pytestmark = pytest.mark.process

CALLS = 20_000


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGCONT])
def test_a_stopped_one_is_sent_no_more_than_its_window(rounds: range, end: signal.Signals) -> None:
    """What it was sent is done by others when it dies, and by itself if it goes on; none of it twice."""
    with driven(2) as driver:
        driver.run(*[add(1, 1) for _ in range(2000)])  # so that windows are wide
        for _ in rounds:
            stopped = driver.pool.workers()[0].pid
            os.kill(stopped, signal.SIGSTOP)
            calls = [add(number, 1) for number in range(CALLS)]
            driver.submit(*calls)
            driver.until(lambda: not driver.pool.dispatcher.queued)
            driver.until(lambda left=calls: sum(call not in driver.outcomes for call in left) <= MAX_WINDOW)
            os.kill(stopped, end)
            outcomes = driver.finish(*calls)
            lost = [outcome for outcome in outcomes if outcome.error is not None]
            assert len(lost) <= (end == signal.SIGKILL), "the one that it was at, at most"
            assert all(
                outcome.error or outcome.result == b"%d" % (number + 1)
                for number, outcome in enumerate(outcomes)
            )
            driver.until(lambda: driver.pool.ready == 2)
