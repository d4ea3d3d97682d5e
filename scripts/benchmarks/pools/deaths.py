"""Cases: workers that are killed while they work.

Calls are kept under way, each of which tells in which process it began and when. Killed is a worker that
has just answered; nothing of a pool's insides is looked at. A call without an answer for LOST seconds
counts as lost, and another takes its place.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import AbstractContextManager, suppress
from statistics import median
from typing import Any, NamedTuple

from benchmarks.pools.contenders import WORKERS, Cannot, Contender, Pool, warm
from benchmarks.pools.functions import where_and_when
from benchmarks.pools.samples import Figure, Figures

PAUSE = 0.05
"""Seconds between kills."""

UNDER_WAY = 4 * WORKERS

LATELY = 200
"""Answers among which the kills find a living worker."""

LOST = 1.0
"""Seconds."""

PATIENCE = 5.0
"""Seconds in which a killed worker must have a successor."""

_left_open: list[AbstractContextManager[Pool]] = []


class Answer(NamedTuple):
    pid: int
    began: float
    """Seconds of CLOCK_MONOTONIC."""


class Churn:
    """The calls of a pool and what becomes of them."""

    def __init__(self, contender: Contender, turns: int) -> None:
        # Not closed: some pools that have lost workers never end. This process does, and they with it.
        context = contender.open()
        _left_open.append(context)
        self._pool = context.__enter__()
        warm(self._pool, contender)
        self._futures = contender.futures
        self._turns = turns
        self._calls: list[tuple[Any, float]] = []
        self._killed: set[int] = set()
        self.answers: list[Answer] = []
        self.failures: dict[str, int] = {}
        self.broken = ""

    def turn(self) -> None:
        """Look for answers, and keep as many calls under way as there were."""
        if self._futures:
            self._look()
            self._fill()
        else:
            self._batch()

    def drain(self) -> None:
        """Wait for what is under way, as long as that is not lost."""
        end = time.monotonic() + 2 * LOST
        while self._calls and time.monotonic() < end:
            self._look()

    def _look(self) -> None:
        waiting, now = [], time.monotonic()
        for handle, since in self._calls:
            if self._pool.done(handle):
                try:
                    self.answers.append(Answer(*self._pool.result(handle)))
                except Exception as error:
                    self._failed(type(error).__name__)
            elif now - since > LOST:
                self._failed("no answer")
            else:
                waiting.append((handle, since))
        if len(waiting) == len(self._calls):
            time.sleep(0.0005)  # not a way to wait that all pools have; the calls tell their times themselves
        self._calls = waiting

    def _fill(self) -> None:
        while len(self._calls) < UNDER_WAY:
            try:
                handle = self._pool.submit(where_and_when, self._turns)
            except Exception as error:
                self.broken = f"breaks: {type(error).__name__}"
                return
            self._calls.append((handle, time.monotonic()))

    def _batch(self) -> None:
        """What has no futures makes calls together, which fail together."""
        try:
            self.answers += [Answer(*a) for a in self._pool.map(where_and_when, [self._turns] * UNDER_WAY)]
        except Exception as error:
            self._failed(type(error).__name__, UNDER_WAY)

    def _failed(self, why: str, calls: int = 1) -> None:
        self.failures[why] = self.failures.get(why, 0) + calls

    def kill(self) -> float | None:
        """Kill the worker that answered last and lives; returns when, or None if there is none lately."""
        lately = [answer.pid for answer in self.answers[-LATELY:]]
        pid = next((pid for pid in reversed(lately) if pid not in self._killed), None)
        if pid is None:
            return None
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                if os.getsid(pid) != os.getsid(0):
                    return None  # the number is another's by now
                now = time.monotonic()
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                self._killed.add(pid)
                return now
            finally:
                os.close(handle)
        return None

    def for_seconds(self, seconds: float) -> int:
        """How many calls were answered."""
        before, end = len(self.answers), time.monotonic() + seconds
        while time.monotonic() < end and not self.broken:
            self.turn()
        return len(self.answers) - before

    def successor(self) -> float:
        """Milliseconds from a worker's end to the first call that begins in a new process."""
        self.for_seconds(PAUSE)
        while (killed := self.kill()) is None:
            self.for_seconds(PAUSE)
        before = {answer.pid for answer in self.answers}
        seen, end = len(self.answers), time.monotonic() + PATIENCE
        while not self.broken:
            self.turn()
            for answer in self.answers[seen:]:
                if answer.pid not in before:
                    return 1e3 * (answer.began - killed)
            seen = len(self.answers)
            if time.monotonic() > end:
                raise Cannot(f"no call by a new worker in {PATIENCE:.0f} s")
        raise Cannot(self.broken)


def replacement(contender: Contender, kills: int, turns: int) -> Figures:
    """The median and the worst of `kills` kills, one after the other; the calls are of 1 ms."""
    churn = Churn(contender, turns // 20)
    each = [churn.successor() for _ in range(kills)]
    return {"replaced": Figure(median(each)), "replaced, worst": Figure(max(each))}


def goodput(contender: Contender, milliseconds: int, turns: int) -> Figures:
    """Calls of 5 ms that are answered while workers are killed, as a share of those without kills."""
    churn = Churn(contender, turns // 4)
    churn.for_seconds(0.2)
    seconds = milliseconds / 1000
    undisturbed = churn.for_seconds(seconds)
    stop = threading.Event()
    kills = 0

    def kill_on() -> None:
        nonlocal kills
        while not stop.wait(PAUSE):
            kills += churn.kill() is not None

    killer = threading.Thread(target=kill_on)
    killer.start()
    answered = churn.for_seconds(seconds)
    stop.set()
    killer.join()
    churn.drain()
    lost = ", ".join(f"{calls} {why}" for why, calls in churn.failures.items())
    note = churn.broken or f"{kills} kills; {lost or 'nothing'} lost"
    return {
        "undisturbed": Figure(undisturbed / seconds),
        "disturbed": Figure(answered / seconds),
        "goodput": Figure(100 * answered / undisturbed, note),
    }
