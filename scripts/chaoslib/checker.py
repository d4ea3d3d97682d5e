"""Whether a history keeps the promises. Pure.

An acknowledged request has exactly one terminal outcome, posted at least once under its id; nothing waits for
ever. In detail, each with the name under which a breach of it is told:

lost          acknowledged, and no outcome was posted
undelivered   posted, and no hook that took it, although all hooks came back
hanging       never acknowledged though it was repeated, or a Client's call that did not end
two outcomes  two different outcomes for an id
wrong         an outcome that the arguments do not give, and that no fault explains
stranger      an answer, or an execution, of an id that nobody has sent whole
again         more executions than faults explain: an execution is repeated only if its worker died
refused       a refusal that no sender has earned, as a `conflict` for a repeat
survivor      a worker that outlived its killed supervisor

Without a journal a supervisor's death excuses what it had taken: `durable` is False then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from math import inf
from typing import NamedTuple
from urllib.parse import unquote

from chaoslib.history import Call, History
from chaoslib.work import CRASHES, right

PASSING = frozenset({"busy", "shutting_down", "error", "-"})
"""Codes of refusals that say "later"; `error` is a fault of the supervisor's own, which it survives, `-` that
of a peer that is told none.
"""

POISONED_BY = 2
"""Deaths, at the least, before a call is given up as `poisoned`."""


class Violation(NamedTuple):
    kind: str
    id: str
    what: str


class Faults:
    """When what died."""

    def __init__(self, history: History) -> None:
        self.downs = sorted(at for at, _, _ in history.downs)
        # A killed supervisor takes its workers along a moment before its end is seen.
        self.downs += [at for at, role, _ in history.kills if role == "supervisor"]
        self.downs.sort()
        self.ups = sorted(history.ups)
        self.worker_kills = sorted(at for at, role, _ in history.kills if role != "supervisor")
        self._of_pid: dict[int, list[tuple[int, int]]] = {}  # from when, to when it may have been
        for at, role, pids in history.kills:
            if role != "supervisor":
                for pid in pids:
                    self._of_pid.setdefault(pid, []).append((at, max(at, history.killed.get(pid, at))))
        for call in history.calls.values():
            if call.task == "die":  # its worker is its own victim
                for at, pid in call.begins:
                    self._of_pid.setdefault(pid, []).append((at, at))
                    self.worker_kills.append(at)
        self.worker_kills.sort()

    def supervisor_died(self, since: int, until: int) -> bool:
        return _within(self.downs, since, until) > 0

    def supervisor_was_away(self, since: int, until: int) -> bool:
        """Whether there was a time within these at which it took no requests."""
        died = bisect_left(self.downs, until + 1)
        if not died:
            return False
        # It came back before they began, or it did not.
        return not any(self.downs[died - 1] < up < since for up in self.ups)

    def deaths(self, since: int, until: int) -> int:
        return _within(self.downs, since, until) + self.worker_deaths(since, until)

    def worker_deaths(self, since: int, until: int) -> int:
        return _within(self.worker_kills, since, until)

    def worker_died(self, pid: int, since: int, until: int) -> bool:
        if self.supervisor_died(since, until):
            return True
        return any(first <= until and last >= since for first, last in self._of_pid.get(pid, ()))


def _within(times: list[int], since: int, until: int) -> int:
    return bisect_left(times, until + 1) - bisect_left(times, since)


def check(history: History, *, durable: bool) -> list[Violation]:
    """All breaches, those of one kind together."""
    faults = Faults(history)
    found = [
        Violation(*breach) for call in history.calls.values() for breach in _breaches(call, faults, durable)
    ]
    found += [
        Violation("stranger", id, "it was cut short, and executed or answered all the same")
        for id in history.cut
        if (call := history.calls.get(id)) is not None and (call.begins or call.posts)
    ]
    found += [Violation("survivor", str(pid), "outlived its supervisor") for pid in history.survivors]
    found += [Violation("unreadable", "-", line) for line in history.unread]
    return sorted(found)


def unsettled(history: History, *, durable: bool) -> int:
    """How many breaches may end yet, if one waits longer."""
    kinds = {"lost", "undelivered", "hanging"}
    return sum(violation.kind in kinds for violation in check(history, durable=durable))


def _breaches(call: Call, faults: Faults, durable: bool) -> Iterator[tuple[str, str, str]]:
    if not call.way:
        yield "stranger", call.id, "nobody has sent it"
        return
    for at, code in call.refused:
        if code not in PASSING:
            yield "refused", call.id, f"{code}, {_seconds(at - call.sent)} after it was sent"
    yield from ((kind, call.id, what) for kind, what in _ends(call, faults, durable))
    yield from ((kind, call.id, what) for kind, what in _outcomes(call, faults, durable))
    for (begun, pid), (next_begun, _) in zip(sorted(call.begins), sorted(call.begins)[1:], strict=False):
        if not faults.worker_died(pid, begun, next_begun):
            yield (
                "again",
                call.id,
                f"executed {len(call.begins)} times, though its worker {pid} was not killed",
            )
            break


def _ends(call: Call, faults: Faults, durable: bool) -> Iterator[tuple[str, str]]:
    """Whether it has come to its end."""
    if call.way == "user":
        if call.returned is None:
            yield "hanging", "the Client's call has not ended"
        return
    if call.way == "raw":
        return
    if call.acked is None:
        if call.way != "flood" and not any(code not in PASSING for _, code in call.refused):
            yield "hanging", f"sent {call.again + 1} times, and never acknowledged"
        return
    if not call.posts:
        if durable or not faults.supervisor_died(call.sent, 2**63):
            yield "lost", "acknowledged, and never answered"
    elif not call.taken and (durable or not faults.supervisor_died(call.sent, 2**63)):
        yield "undelivered", f"posted {len(call.posts)} times, and never taken"


def _outcomes(call: Call, faults: Faults, durable: bool) -> Iterator[tuple[str, str]]:
    """Whether what it was answered is right, and always the same."""
    if call.way == "user":
        if call.returned is not None and not _explained(call, *call.returned, faults):
            yield "wrong", f"{call.task}({call.number}) ended with {unquote(call.returned[1])}"
        return
    for at, what in call.posts:
        if not _explained(call, at, what, faults):
            yield "wrong", f"{call.task}({call.number}) was answered {unquote(what)}"
            break
    different = dict.fromkeys(what for _, what in sorted(call.posts))
    if len(different) > 1:
        first, last = min(call.posts)[0], max(call.posts)[0]
        if durable or not faults.supervisor_died(call.sent, last):
            yield "two outcomes", f"{', then '.join(map(unquote, different))}; {_seconds(last - first)} apart"


def _explained(call: Call, at: int, what: str, faults: Faults) -> bool:
    kind, _, rest = what.partition(":")
    if kind == "ok":
        return what == right(call.task, call.number)
    code, _, text = rest.partition(":")
    if code == "-":
        code = _code_of(unquote(text))
    deaths = faults.deaths(call.sent, at)
    if f"error:{code}" == right(call.task, call.number):
        return True
    if code == "worker_lost":
        enough = CRASHES + 1 if call.task == "stubborn" else 1
        return faults.worker_deaths(call.sent, at) >= enough
    if code == "poisoned":
        return deaths >= POISONED_BY
    if call.way == "user" and code in ("connection_lost", "unreachable", "shutting_down"):
        return faults.supervisor_was_away(call.sent, at)
    # Refusals come as answers in generation 1, which has no acknowledgement, and to a Client's callers.
    return call.way in ("raw", "user") and code in PASSING


def _code_of(text: str) -> str:
    """The code of an error that was told without it, by its text."""
    for part, code in (
        (" while it ran task ", "worker_lost"),
        ("on purpose: ", "task_error"),
        ("poison", "poisoned"),
        (" supervisors have died while ", "poisoned"),
        ("is stopping", "shutting_down"),
        ("the journal ", "busy"),
        (" cannot be looked at now: ", "busy"),
    ):
        if part in text:
            return code
    return text


def story(call: Call) -> list[str]:
    """All that is known of an id, a line each, in seconds after it was first heard of."""
    events = [(call.sent, f"sent by {call.way}: {call.task}({call.number})")] if call.way else []
    events += [(at, f"refused: {code}") for at, code in call.refused]
    events += [(call.acked, "acknowledged")] if call.acked is not None else []
    events += [(at, f"execution begins in worker {pid}") for at, pid in call.begins]
    events += [(at, f"posted {unquote(what)}") for at, what in call.posts]
    events += [(call.returned[0], f"returned {unquote(call.returned[1])}")] if call.returned else []
    events.sort()
    return [f"{_seconds(at - events[0][0]):>10}  {what}" for at, what in events]


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:.3f} s"


def figures(history: History) -> dict[str, int | float]:
    """The report's numbers, in its order."""
    calls = [call for call in history.calls.values() if call.way]
    acked = [call for call in calls if call.acked is not None]
    errors = Counter(_kinds(call.posts[-1][1] for call in acked if call.posts))
    executed = [call for call in calls if call.begins]
    kills = Counter(role for _, role, _ in history.kills)
    found: dict[str, int | float] = {
        "sent": len(calls),
        "sent again": sum(call.again for call in calls),
        "acknowledged": len(acked),
        "refused for a while": sum(len(call.refused) for call in calls),
        "answered": sum(bool(call.posts) for call in acked),
        **{f"  with {name}": count for name, count in sorted(errors.items())},
        "posted again": sum(max(len(call.posts) - 1, 0) for call in acked),
        "calls of Clients": sum(call.returned is not None for call in calls),
        "cut in a frame": len(history.cut),
        "executions": sum(len(call.begins) for call in executed),
        "extra executions": sum(len(call.begins) - 1 for call in executed),
        "in flight at kills": _in_flight(executed, history.kills),
        **{f"killed: {role}": count for role, count in sorted(kills.items())},
        "supervisors that ended by themselves": len(history.downs) - kills["supervisor"],
        **{f"fault: {name}": count for name, count in sorted(history.faults.items())},
    }
    if history.orphans:
        found["workers gone after, ms at most"] = max(history.orphans)
    return found


def _kinds(outcomes: Iterable[str]) -> Iterator[str]:
    for what in outcomes:
        kind, _, rest = what.partition(":")
        code, _, text = rest.partition(":")
        yield "a result" if kind == "ok" else _code_of(unquote(text)) if code == "-" else code


def _in_flight(executed: list[Call], kills: list[tuple[int, str, frozenset[int]]]) -> int:
    """Executions that kills have hit: begun before one, and not answered."""
    answered = {call.id: min(call.posts)[0] for call in executed if call.posts}
    begins = sorted(min(call.begins)[0] for call in executed)
    ends = sorted(answered.values())
    of_worker: dict[int, list[tuple[int, float]]] = {}
    for call in executed:
        for begun, pid in call.begins:
            of_worker.setdefault(pid, []).append((begun, answered.get(call.id, inf)))
    hit = 0
    for at, role, pids in kills:
        if role == "supervisor":
            hit += bisect_left(begins, at) - bisect_left(ends, at)
        else:
            hit += sum(begun < at <= end for pid in pids for begun, end in of_worker.get(pid, ()))
    return hit
