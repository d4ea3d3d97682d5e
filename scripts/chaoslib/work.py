"""What the tasks compute, so that whoever knows the arguments knows the right answer. Pure."""

from __future__ import annotations

from collections.abc import Sequence

WEIGHTS = {"quick": 0.81, "busy": 0.12, "doze": 0.01, "fail": 0.04, "stubborn": 0.0195, "die": 0.0005}
"""Tasks, and their share of the requests: tiny ones; some milliseconds of work; tenths of a second, so that
there is always something in flight; one that raises; one that is tried again after a crash; one that kills
its worker.
"""

CRASHES = 5
"""Deaths of its worker that a `stubborn` call survives."""

TASKS: Sequence[str] = tuple(WEIGHTS)


def mixed(number: int) -> int:
    """A result that no other argument has by chance, and none has by default."""
    return (number * 2654435761 + 12345) % 2**32


def right(task: str, number: int) -> str:
    """The outcome, as the history spells it, of a call that nothing has disturbed."""
    if task == "fail":
        return "error:task_error"
    if task == "die":
        return "error:worker_lost"
    return f"ok:{mixed(number)}"
