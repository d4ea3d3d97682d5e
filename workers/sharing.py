"""Calls that share one run, as their key is the same. Pure.

    @task(key="user")          member 7 --+
    report("ann")              member 9 --+--> run 8, which workers see
    report("ann")              member 12 -+

Every call keeps its own number, deadline and outcome, and is a member; what is queued, sent and tried again
is the run, a Call of the dispatcher's own. So there is no first among them whose leaving the others would
notice, and whoever submits (or keeps) requests knows nothing of the others. It is decided below all that,
next to the queues: only there is known until when a run can be joined, and a run that nobody wants is given
up by the same rules as any call.
"""

from __future__ import annotations

from workers.calls import Call


class Shared:
    """The runs that can be joined, by task and key, and the members of all runs, by their numbers."""

    def __init__(self) -> None:
        self.members: dict[int, Call] = {}
        self._runs: dict[tuple[str, bytes], Call] = {}

    def __len__(self) -> int:
        return len(self.members) + len(self._runs)

    def join(self, call: Call) -> tuple[Call, bool]:
        """Make a numbered call a member; the run, and whether it is new and to be queued."""
        assert call.key is not None
        name = call.task, call.key
        run = self._runs.get(name)
        new = run is None
        if run is None:
            run = self._runs[name] = _run(call)
        elif run.deadline is not None:
            # What the task sees of deadlines: that of whoever waits longest.
            run.deadline = None if call.deadline is None else max(run.deadline, call.deadline)
        assert run.sharers is not None
        run.sharers[call.number] = call
        call.run = run
        self.members[call.number] = call
        return run, new

    def joinable(self, task: str, key: bytes) -> Call | None:
        """The run that a call of that key would join."""
        return self._runs.get((task, key))

    def leave(self, call: Call) -> bool:
        """A member wants its outcome no more. False: the others have left before, so it stays, to have the
        outcome of the run's end, which nobody can join from now on.
        """
        run = call.run
        assert run is not None and run.sharers is not None
        if len(run.sharers) == 1:
            self._close(run)
            return False
        del run.sharers[call.number], self.members[call.number]
        return True

    def end(self, run: Call) -> list[Call]:
        """A run has ended: whose outcome that is."""
        self._close(run)
        members = list((run.sharers or {}).values())
        for call in members:
            del self.members[call.number]
        return members

    def _close(self, run: Call) -> None:
        name = run.task, run.key or b""
        if self._runs.get(name) is run:
            del self._runs[name]


def _run(call: Call) -> Call:
    return Call(
        call.task,
        call.args,
        id=call.id,
        priority=call.priority,
        timeout=call.timeout,
        deadline=call.deadline,
        retries=call.retries,
        crashes=call.crashes,
        backoff=call.backoff,
        origin=call.origin,
        concurrency=call.concurrency,
        overlaps=call.overlaps,
        key=call.key,
        isolated=call.isolated,
        max_memory=call.max_memory,
        sharers={},
    )
