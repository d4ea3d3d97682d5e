"""What happened, as lines in files. A line is `TIME KIND FIELD...`, separated by spaces, with the time in
nanoseconds of the monotonic clock, which all processes of a machine share.

by clients (one file each)
    sent ID TASK NUMBER WAY     about to be sent for the first time; WAY is kept, plain, raw (no
                                acknowledgement), flood (not sent again) or user (a Client, which keeps its
                                acknowledgements and its hook to itself)
    again ID                    about to be sent again, as no acknowledgement came, or a refusal that may pass
    acked ID                    acknowledged without an error
    refused ID CODE             acknowledged with an error
    cut ID                      a part of a request is sent and no more; there is no `sent` of that id
    returned ID OUTCOME         what a Client's call ended with
by hooks (one file each)
    posted ID OUTCOME TAKEN     an answer came; TAKEN is 1 if it is acknowledged now, 0 if not
by tasks (one file for all)
    begin ID ATTEMPT PID
    end ID ATTEMPT PID
by the runner
    up PID                      a supervisor takes requests
    down PID STATUS             it has ended
    kill ROLE PID...            about to be killed: a worker, the supervisor, the template with its workers
    killed PID                  it is gone: what it has begun since `kill` was begun before the signal came
    survived PID MILLISECONDS   a process outlived its killed supervisor for so long
    orphans MILLISECONDS        all processes of a killed supervisor were gone after so long
    fault NAME FIELD...         any other fault begins

An OUTCOME is `ok:RESULT` or `error:CODE:TEXT`, percent-encoded; peers that do not ask for codes are told
none, and write `-`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

TASKS_LOG = "CHAOS_TASKS_LOG"
"""The environment variable with the path of the tasks' file."""

_LONGEST_TEXT = 200


class Log:
    """A file to which several processes may append. A line is a single write, so a kill cannot lose one that
    `note` has returned from, nor cut it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def note(self, kind: str, *fields: object) -> None:
        words = " ".join([str(time.monotonic_ns()), kind, *map(str, fields)])
        os.write(self._fd, f"{words}\n".encode())

    def close(self) -> None:
        os.close(self._fd)


def outcome(response: dict[str, Any]) -> str:
    """The outcome that a decoded response of any generation carries."""
    if not response["error"]:
        return f"ok:{quote(str(response['result']), safe='')}"
    code = (response.get("error_info") or {}).get("code", "-")
    return f"error:{code}:{quote(response['error'][:_LONGEST_TEXT], safe='')}"


class Call:
    """All that is known of one id. Times are nanoseconds."""

    __slots__ = (
        "acked",
        "again",
        "begins",
        "ended",
        "id",
        "number",
        "posts",
        "refused",
        "returned",
        "sent",
        "taken",
        "task",
        "way",
    )

    def __init__(self, id: str) -> None:
        self.id = id
        self.task = ""
        self.number = 0
        self.way = ""  # none: nobody has sent it
        self.sent = 0
        self.again = 0
        self.acked: int | None = None
        self.refused: list[tuple[int, str]] = []
        self.begins: list[tuple[int, int]] = []  # time and pid
        self.ended = 0
        self.posts: list[tuple[int, str]] = []  # time and outcome
        self.taken = 0
        self.returned: tuple[int, str] | None = None


class History:
    """All lines that were fed, by id, and the faults. The order between files does not matter."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.cut: set[str] = set()
        self.kills: list[tuple[int, str, frozenset[int]]] = []  # time, role, pids
        self.killed: dict[int, int] = {}  # pid, and when it was gone
        self.ups: list[int] = []
        self.downs: list[tuple[int, int, int]] = []  # time, pid, status
        self.faults: Counter[str] = Counter()
        self.survivors: list[int] = []
        self.orphans: list[float] = []
        self.unread: list[str] = []

    def feed(self, lines: Iterable[str]) -> None:
        for line in lines:
            at, kind, *fields = line.split()
            self._take(int(at), kind, fields, line)

    def call(self, id: str) -> Call:
        found = self.calls.get(id)
        if found is None:
            found = self.calls[id] = Call(id)
        return found

    def _take(self, at: int, kind: str, fields: list[str], line: str) -> None:
        match kind, fields:
            case "begin", [id, _, pid]:
                self.call(id).begins.append((at, int(pid)))
            case "end", [id, *_]:
                self.call(id).ended += 1
            case "posted", [id, what, taken]:
                call = self.call(id)
                call.posts.append((at, what))
                call.taken += int(taken)
            case "sent", [id, task, number, way]:
                call = self.call(id)
                call.sent, call.task, call.number, call.way = at, task, int(number), way
            case "acked", [id]:
                call = self.call(id)
                if call.acked is None:
                    call.acked = at
            case "refused", [id, code]:
                self.call(id).refused.append((at, code))
            case "again", [id]:
                self.call(id).again += 1
            case "returned", [id, what]:
                self.call(id).returned = (at, what)
            case "cut", [id]:
                self.cut.add(id)
            case _:
                self._take_fault(at, kind, fields, line)

    def _take_fault(self, at: int, kind: str, fields: list[str], line: str) -> None:
        match kind, fields:
            case "up", [_]:
                self.ups.append(at)
            case "down", [pid, status]:
                self.downs.append((at, int(pid), int(status)))
            case "kill", [role, *pids]:
                self.kills.append((at, role, frozenset(map(int, pids))))
            case "killed", [pid]:
                self.killed[int(pid)] = at
            case "fault", [name, *_]:
                self.faults[name] += 1
            case "survived", [pid, _]:
                self.survivors.append(int(pid))
            case "orphans", [milliseconds]:
                self.orphans.append(float(milliseconds))
            case _:
                self.unread.append(line)


class Tail:
    """A file that grows: `read` gives the whole lines that have come since."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._rest = b""

    def read(self) -> list[str]:
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [line.decode() for line in whole]

    def close(self) -> None:
        self._file.close()
