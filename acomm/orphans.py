"""Calls whose connection to the supervisor has ended: it, or who has come after it, is asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from acomm.away import reachable
from acomm.errors import AcommError, Busy, CallTimeout, ConnectionLost, ShuttingDown
from acomm.jsontext import parse
from acomm.messages import Request, Response
from acomm.tracker import Answer

GRACE = 0.5
"""Seconds to read what a supervisor has said before it went away."""

PATIENCE = 30.0
"""Seconds to find out about a call whose supervisor stores what it takes, or that cannot be asked now."""

MAX_ASKED = 5_000
"""Ids in one question."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.25
_CALM_PAUSE = 1.0
"""Seconds between questions: soon at first; seldom when all calls are known."""

_TIMEOUT = 5.0  # seconds for an answer
_PASSING = (Busy, CallTimeout, ConnectionLost, ShuttingDown)
"""Errors after which it may be asked again. Any other says that the supervisor does not know the verb."""


class _Lost:
    """Since when nobody has answered for a call, and whether it is stored."""

    __slots__ = ("since", "stored")

    def __init__(self, since: float, stored: bool) -> None:
        self.since = since
        self.stored = stored


class Orphans:
    """Acknowledged calls whose answer comes by another connection, if it comes: as long as a supervisor at
    `url` says that it will, they are waited for. `give_up(id)` is called for the others: at once where one
    does not know them, and after a moment where nobody is there, or `wait` seconds (PATIENCE at least) if
    they are stored, since the next one takes them up then.

    `post(request, answer)` sends a question, `waits(id)` tells whether a call has no answer yet. It belongs
    to one event loop.
    """

    def __init__(
        self,
        url: str,
        wait: float,
        post: Callable[[Request, Answer], None],
        waits: Callable[[str], bool],
        give_up: Callable[[str], None],
    ) -> None:
        self._url = url
        self._patience = max(wait, PATIENCE)
        self._post = post
        self._waits = waits
        self._give_up = give_up
        self._lost: dict[str, _Lost] = {}
        self._task: asyncio.Task[None] | None = None
        self._pause = _FIRST_PAUSE

    def __len__(self) -> int:
        return len(self._lost)

    def add(self, ids: list[str], *, stored: bool) -> None:
        """The connection of these calls has ended just now."""
        loop = asyncio.get_running_loop()
        for id in ids:
            before = self._lost.get(id)
            self._lost[id] = _Lost(loop.time(), stored or (before is not None and before.stored))
        self._pause = _FIRST_PAUSE
        if self._lost and (self._task is None or self._task.done()):
            self._task = loop.create_task(self._watch())

    def close(self) -> None:
        """Ask no more. What is lost is left to its owner."""
        self._lost.clear()
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for id in [id for id in self._lost if not self._waits(id)]:
                del self._lost[id]
            if not self._lost:
                return
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            there = await reachable(self._url)
            ids = [id for id in self._lost if self._waits(id)]
            all_known = bool(ids)
            for start in range(0, len(ids), MAX_ASKED):
                asked = ids[start : start + MAX_ASKED]
                known = await self._ask(asked) if there else None
                self._judge(asked, known, there, loop.time())
                all_known = all_known and known is not None and known.issuperset(asked)
            if all_known:
                self._pause = _CALM_PAUSE

    def _judge(self, ids: list[str], known: set[str] | None, there: bool, now: float) -> None:
        """`known` is None where nobody has answered."""
        for id in ids:
            lost = self._lost.get(id)
            if lost is None:
                continue
            if known is not None and id in known:
                lost.since = now
                continue
            patience = GRACE
            if known is None and (there or lost.stored):
                patience = self._patience
            if now - lost.since >= patience:
                del self._lost[id]
                self._give_up(id)

    async def _ask(self, ids: list[str]) -> set[str] | None:
        """Those whose answer will come; None if it cannot be told now."""
        told: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._post(Request("acomm.known", [ids], timeout=_TIMEOUT), told)
        try:
            response = await told
            if response.error is not None:
                raise response.error
            found = parse(b"[]" if response.result is None else memoryview(response.result), "ids")
        except _PASSING:
            return None
        except AcommError:
            return set()
        return {id for id in found if isinstance(id, str)} if isinstance(found, list) else set()
