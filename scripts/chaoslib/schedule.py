"""Which fault strikes when: decided before anything runs, by a seed. Pure."""

from __future__ import annotations

import random
from typing import NamedTuple

WORKER, TEMPLATE, SUPERVISOR = "worker", "template", "supervisor"

A_MINUTE = {
    WORKER: 40.0,
    TEMPLATE: 2.0,
    SUPERVISOR: 18.0,
    "stop": 6.0,
    "hooks": 12.0,
    "disk": 2.0,
    "calls": 8.0,
    "cut": 30.0,
    "flood": 2.0,
}
"""Faults, and how often each strikes in a minute. Of the kills 70 % are workers' and 30 % supervisors'."""

ABOUT = {
    WORKER: "SIGKILL to a worker process",
    TEMPLATE: "SIGKILL to the process that workers are forked from",
    SUPERVISOR: "SIGKILL to the supervisor, which is started again",
    "stop": "SIGSTOP to a worker or the supervisor, and SIGCONT within 3 s",
    "hooks": "a hook hangs, refuses, closes without a word, or is gone, for a while",
    "disk": "the journal's disk is full for a while",
    "calls": "write, fsync, fdatasync, open, accept or fork fails, once",
    "cut": "a client ends in the middle of a frame",
    "flood": "thousands of requests at once, on many connections",
}

NEED_A_JOURNAL = frozenset({SUPERVISOR, "disk"})
"""Faults that are left out without one: nothing is promised then to what a dead supervisor had taken."""

CALLS = {
    "write": ("EIO", "ENOSPC"),
    "fsync": ("EIO",),
    "fdatasync": ("EIO",),
    "open": ("EMFILE", "ENFILE"),
    "accept": ("ECONNABORTED", "ENFILE"),
    "fork": ("EAGAIN", "ENOMEM"),
}
"""System calls, and how each may fail. EMFILE is not among accept's: it ends the process in the ZeroMQ
library, which keeps descriptors spare against that.
"""

TROUBLES = ("hang", "refuse", "rude", "gone")


class Planned(NamedTuple):
    """A fault. `chance`, from 0 to 1, chooses among what is alive at that time; `for_seconds` is how long it
    lasts, where it does; `detail` says which of its kind.
    """

    at: float
    fault: str
    chance: float
    for_seconds: float
    detail: tuple[str | int, ...] = ()


def plan(seed: int, seconds: float, faults: tuple[str, ...], *, rate: float = 1.0) -> list[Planned]:
    """The faults within `seconds`, in order. Each kind has random numbers of its own, so that leaving one out
    does not move the others. `rate` multiplies how often they strike.
    """
    found = []
    for fault in faults:
        chances = random.Random(f"{seed} {fault}")
        at = chances.expovariate(A_MINUTE[fault] * rate / 60)
        while at < seconds:
            found.append(
                Planned(at, fault, chances.random(), _lasts(fault, chances), _detail(fault, chances))
            )
            at += chances.expovariate(A_MINUTE[fault] * rate / 60)
    return sorted(found)


def _lasts(fault: str, chances: random.Random) -> float:
    if fault in ("stop", "hooks", "disk"):
        return chances.uniform(0.1, 3.0)
    return 0.0


def _detail(fault: str, chances: random.Random) -> tuple[str | int, ...]:
    if fault == "hooks":
        return (chances.choice(TROUBLES),)
    if fault == "calls":
        call = chances.choice(tuple(CALLS))
        return call, chances.choice(CALLS[call]), chances.randint(0, 20)
    if fault == "flood":
        return (chances.randint(500, 3000),)
    return ()
