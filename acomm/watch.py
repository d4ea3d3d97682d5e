"""How far calls are: one question to the supervisor, some times a second, for all that anybody looks at."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import islice

import msgspec

from acomm import jsontext
from acomm.calls import Call, Progress
from acomm.errors import AcommError, BadRequest, Busy, CallTimeout, ConnectionLost, ShuttingDown
from acomm.messages import Request, Response
from acomm.tracker import Answer

log = logging.getLogger("acomm.client")

PAUSE = 0.2
"""Seconds between an answer and the next question."""

MAX_ASKED = 10_000
"""Calls that one question is about: what the supervisor answers at once. More take turns."""

_PATIENCE = 5.0  # seconds
_PASSING = (Busy, CallTimeout, ConnectionLost, ShuttingDown)
"""Errors after which it may be asked again. Any other says that the supervisor does not know the verb."""


class _Told(msgspec.Struct):
    state: str = ""
    done: float = 0.0
    total: float = 0.0
    note: str = ""


_told = msgspec.json.Decoder(dict[str, _Told])


class ProgressWatch:
    """Keeps the `progress` of the calls that are watched as fresh as the supervisor's answers, for as long as
    they run. `post(request, answer)` sends a request. It belongs to one event loop.
    """

    def __init__(self, post: Callable[[Request, Answer], None]) -> None:
        self._post = post
        self._calls: dict[str, Call] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._asking = False
        self._known = True

    def __contains__(self, id: str) -> bool:
        return id in self._calls

    def add(self, call: Call) -> None:
        """Watch `call` until it has ended."""
        if self._known and call.id not in self._calls:
            self._calls[call.id] = call
            if self._timer is None and not self._asking:
                self._ask()

    def supervisor_changed(self) -> None:
        """The one that comes may know the verb."""
        self._known = True

    def close(self) -> None:
        self._calls.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ask(self) -> None:
        self._timer = None
        for id in [id for id, call in self._calls.items() if not call.under_way()]:
            del self._calls[id]
        if not self._calls:
            return
        ids = list(islice(self._calls, MAX_ASKED))
        if len(ids) < len(self._calls):
            for id in ids:
                self._calls[id] = self._calls.pop(id)
        self._asking = True
        self._post(Request("acomm.progress", ids, timeout=_PATIENCE), _Answer(self._answered))

    def _answered(self, response: Response) -> None:
        self._asking = False
        error = response.error
        if error is None:
            error = self._note(response)
        if error is not None and not isinstance(error, _PASSING):
            log.debug("the supervisor does not tell how far calls are: %s", error)
            self._known = False
            self._calls.clear()
        if self._calls:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._ask)

    def _note(self, response: Response) -> AcommError | None:
        raw = b"{}" if response.result is None else memoryview(response.result)
        try:
            told = jsontext.parse_as(_told, raw, "progress")
        except BadRequest as error:
            return error
        for id, known in told.items():
            if (call := self._calls.get(id)) is not None:
                call.note_progress(Progress(known.done, known.total or None, known.note, known.state))
        return None


class _Answer:
    """What a Tracker resolves."""

    __slots__ = ("_answered",)

    def __init__(self, answered: Callable[[Response], None]) -> None:
        self._answered: Callable[[Response], None] | None = answered

    def done(self) -> bool:
        return self._answered is None

    def set_result(self, response: Response) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(response)

    def set_exception(self, error: BaseException) -> None:
        self.set_result(
            Response("", error=error if isinstance(error, AcommError) else AcommError(str(error)))
        )
