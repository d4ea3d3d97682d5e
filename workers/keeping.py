"""A supervisor's journal: requests are begun when they are stored, answers are told when they are stored, and
what earlier supervisors have left is taken up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sqlite3
import sys
from collections.abc import Callable
from typing import Protocol

import msgspec

from acomm.errors import AcommError
from acomm.messages import Request, Response
from acomm.origin import Origin
from acomm.parcel import Reload
from acomm.tracker import Tracker
from workers.admission import Admission
from workers.errors import Busy, Conflict, printable
from workers.examining import Examined, Examiner, args_size
from workers.journal import Journal
from workers.journalfile import JournalFile, Row
from workers.offering import Decided
from workers.outlook import Outlook
from workers.stored import Left, Recovery, StoredRequests

log = logging.getLogger("acomm.supervisor")

_SWITCH = 0.0001
"""Seconds after which a thread gives the interpreter to another that waits for it."""

_SPARE = 16 * 1024
"""Bytes of a message besides its arguments that are stored as they came."""

MAX_NAMES = 200_000
"""Answers on their way beyond which those to come are given up when there is no memory for them, although
they are stored: each takes some kilobyte as long as its hook takes nothing.
"""

_GIVE_UP_AFTER = 24 * 3600.0
"""Seconds after which a stored answer that its hook does not take is a dead letter."""


class Service(Protocol):
    """What this knows of the supervisor."""

    admission: Admission
    tracker: Tracker
    examiner: Examiner
    outlook: Outlook

    def begin(self, examined: Examined) -> AcommError | None:
        """Have a counted request done; why it cannot be begun, in which case it does not count any more."""

    def track(self, request: Request, origin: Origin) -> None:
        """Put a request on the table of those that are to be answered."""

    def answer(self, response: Response) -> None:
        """Tell the answer to a request; when it is stored, if that is."""

    def told(self, response: Response) -> None:
        """Tell an answer now."""

    def refused(self, error: AcommError) -> None:
        """Count a refusal."""

    def repeated(self) -> None:
        """Count a request that was taken before."""

    def leave(self, id: str) -> None:
        """Forget a request, whose answer is for another supervisor to give."""

    def look_idle(self) -> None:
        """Something has ended."""

    def cannot_go_on(self, why: str) -> None:
        """End: nothing can be promised any more."""


class Keeper:
    """The journal at `path`, for `service`. `full`: a commit survives the loss of power. `few` requests that
    may have killed supervisors are taken up at a time. Raises ConfigError for a file that cannot be used.
    """

    def __init__(self, service: Service, path: str, *, full: bool, few: int) -> None:
        self._service = service
        self._path = path
        self._few = few
        self.journal = Journal(JournalFile(path, full=full), self._failed)
        self.stored = StoredRequests(self.journal)
        self._left = False
        self._loads: set[asyncio.Task[None]] = set()
        self._recovery: Recovery | None = None
        self._recovering: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write, on the running event loop."""
        self._service.tracker.delivery.give_up_after = _GIVE_UP_AFTER
        self.journal.start()
        # Its thread is away from the interpreter for a commit, and else would have to ask for it back for
        # as long as this says.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH))

    async def close(self) -> None:
        """Write what is left, and close the file."""
        await self._end_recovery()
        await self.journal.close()

    @property
    def unfinished(self) -> int:
        """What waits for its commit."""
        return self.stored.storing + self.stored.answering

    # -- requests -----------------------------------------------------------------------------------

    def store(self, examined: Examined, decided: Decided, message: bytes | None) -> None:
        """Have a request stored that has been counted, and begun when it is."""
        if message is not None and len(message) > examined.size + _SPARE:
            message = None  # what is in it that we do not know is not stored: it was not counted

        def done(outcome: Row | AcommError | None) -> None:
            service = self._service
            if outcome is None:
                decided(None, service.outlook.standing(examined))
                if not self._left:
                    self._begin(examined)
                return
            service.admission.release(examined.account, examined.size)
            refusal: AcommError | None = None
            if isinstance(outcome, AcommError):
                refusal = outcome
            elif outcome.digest != examined.content:
                refusal = Conflict(f"the id {printable(outcome.id)} was used for another request")
            else:
                service.repeated()
            if refusal is not None:
                service.refused(refusal)
            service.look_idle()
            decided(refusal)

        self.stored.store(examined.request, examined.content, examined.origin, done, message)

    def _begin(self, examined: Examined) -> None:
        """Begin what has been acknowledged: what goes wrong now is its answer."""
        error = self._service.begin(examined)
        if error is not None:
            self._answer_unbegun(examined.request, examined.origin, error)

    def _answer_unbegun(self, request: Request, origin: Origin, error: AcommError) -> None:
        self._service.track(request, origin)
        self._service.answer(Response.to(request, error=error))

    def take_up(self, left: Left) -> None:
        """Begin, or answer, what an earlier supervisor has left."""
        service = self._service
        request, content, origin, response, stored = left
        try:
            service.examiner.check_handlers(request, origin)
        except AcommError as error:
            # Not even to tell of the error: code of another Python crashes ours where it is loaded.
            log.error("handlers of the request %s do not run: %s", printable(request.id), printable(error))
            request = msgspec.structs.replace(request, handlers=None)
            if response is None:
                self._answer_unbegun(request, origin, error)
                return
        if response is not None:
            service.track(request, origin)
            if stored:
                service.told(response)
            else:
                service.answer(response)
            return
        task, key = None, None
        if service.examiner.is_ours(request):
            try:
                task, key = service.examiner.check_call(request, origin)
            except AcommError as error:
                self._answer_unbegun(request, origin, error)
                return
        # It was accepted when there was room for it, and counts now however little there is.
        account, size = service.admission.account(origin), args_size(request)
        service.admission.take(account, size)
        self._begin(Examined(request, content, origin, account, size, None, task, key))

    # -- answers ------------------------------------------------------------------------------------

    def answer(self, response: Response) -> bool:
        """Store an answer and tell it then; False if it may be told at once."""
        self.ended(response.id)
        request = self._service.tracker.tracked(response.id)
        quiet = request is not None and request.response_hook is None and request.handlers is None
        if quiet and self.stored.owes_nobody(response):
            return False
        return self.stored.answer(response, functools.partial(self._tell, response))

    def _tell(self, response: Response) -> None:
        if self._left and self._service.tracker.tracked(response.id) is None:
            return  # the next one tells it
        self._service.told(response)

    def ended(self, id: str) -> None:
        """A request has its answer."""
        if self._recovery is not None:
            self._recovery.ended(id)

    def reload(self, request: Request) -> Reload | None:
        """How the answer to a request is read again that was forgotten for want of memory, while its hook
        took nothing; None if it is not stored, or so many wait already that even their names take room.
        """
        if (
            request.response_hook is None
            or request.id not in self.stored
            or self._service.tracker.delivery.pending > MAX_NAMES
        ):
            return None
        return functools.partial(self._reload, request.id, request.wire, request.extended)

    def _reload(self, id: str, wire: int, extended: bool, loaded: Callable[[bytes | None], None]) -> None:
        task = asyncio.get_running_loop().create_task(self._load(id, wire, extended, loaded))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def _load(self, id: str, wire: int, extended: bool, loaded: Callable[[bytes | None], None]) -> None:
        payload = None
        try:
            stored = await self.journal.ask(self.journal.file.response, id)
            if stored is not None:
                payload = Response.decode(stored).encode(wire, extended=extended and wire > 1)
        except Exception:  # a journal that has failed, or a fault of ours
            log.exception("the answer to the request %s cannot be read", printable(id))
        loaded(payload)

    def on_delivered(self, id: str) -> Callable[[AcommError | None], None]:
        """Whom to tell when the hook of a request has its answer, or never will."""
        return functools.partial(self.stored.delivered, id)

    # -- other supervisors' -------------------------------------------------------------------------

    def recover(self) -> None:
        """Take up what earlier supervisors have left, beside what comes in."""
        delivery = self._service.tracker.delivery
        self._recovery = Recovery(self.stored, self.take_up, lambda: delivery.pending, self._few)
        self._recovering = asyncio.get_running_loop().create_task(self._recover(self._recovery))

    async def cancel(self, id: str) -> bool:
        """Answer a request with `cancelled` that waits in the file, to be taken up; False if none does.
        Raises Busy.
        """
        if self._recovery is None or self._left:
            return False
        try:
            return await self._recovery.cancel(id)
        except sqlite3.Error as error:
            raise Busy(f"the journal cannot be used: {printable(error)}") from None

    async def _recover(self, recovery: Recovery) -> None:
        try:
            await recovery.run()
        except sqlite3.Error as error:
            self._failed(str(error))
        except Exception:
            log.exception("what earlier supervisors have left could not be taken up")

    async def _end_recovery(self) -> None:
        if self._recovering is not None:
            self._recovering.cancel()
            await asyncio.wait({self._recovering})

    async def leave(self) -> None:
        """Leave what is stored to the next supervisor; it was no death, and does not count as one."""
        await self._end_recovery()
        self._left = True
        # Those whose answer waits for its commit, too: it is for the next one to tell.
        for id in [id for id in self.stored if self._service.tracker.tracked(id) is not None]:
            self._service.leave(id)
            self.stored.leave(id)
        if self._recovery is not None and (rows := self._recovery.left()) and self.journal.broken is None:
            with contextlib.suppress(sqlite3.Error):
                await self.journal.ask(self.journal.file.put_back, rows)

    def _failed(self, text: str) -> None:
        """Nothing can be promised any more, and what was promised is for the next supervisor."""
        log.critical("the journal %s cannot be trusted any more: %s", self._path, text)
        self._service.cannot_go_on(
            f"the journal {self._path} has failed: {text}; what it holds is taken up again"
        )
