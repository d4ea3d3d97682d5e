"""Responses on their way to hooks: tried until acknowledged, or until there is no hope.

`acomm.outbox` decides which goes when; here are the channels, the timer and the log.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from heapq import nlargest
from typing import TYPE_CHECKING, Any, Protocol

from acomm.acks import ok_ack
from acomm.channel import Channels
from acomm.errors import AcommError, BadRequest, ConnectionLost, Forbidden, TooLarge, printable
from acomm.messages import Response
from acomm.outbox import Outbox
from acomm.outgoing import NoAcknowledgement, Outgoing
from acomm.parcel import Dead, Fault, Finished, Parcel, Reload, Why
from acomm.urls import redacted, unix_path

if TYPE_CHECKING:
    from acomm.origin import Origin

log = logging.getLogger("acomm.delivery")

FIRST_BACKOFF = 0.1
LONGEST_BACKOFF = 30.0
GIVE_UP_AFTER = 600.0
"""Seconds. A hook that is down for longer has lost its caller, as nothing here survives a restart."""

MAX_PENDING_BYTES = 256 * 1024 * 1024
"""Bytes of responses that wait for hooks in memory."""

SAFE_FOR_GENERATION_2 = 64 * 1024
"""Bytes of a frame. Its peers read a body with one call, which gets what the socket's buffer holds: some
200 KiB at most, and less if they are quick.
"""

TOLD_OF = 20
"""Hooks in trouble that `troubled` tells of."""

_TOLD_A_MINUTE = 10

_expected = {wire: ok_ack(b'""', wire, True) for wire in (1, 2, 3)}


class Timer(Protocol):
    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]
"""Runs a function in so many seconds, as a loop's `call_later`."""


class Delivery:
    """Posts responses to hooks through `channels`, again and again with growing pauses.

    While a hook cannot be reached or does not acknowledge, its responses wait, and one at a time is tried.
    An acknowledgement that carries an error is no delivery; that response is tried again by itself. After
    `give_up_after` seconds it is given up, and so are the oldest that wait when they hold more than
    `max_pending_bytes`. `delivered`, `abandoned` and `pending` count responses.

    `clock` is monotonic, and the timer of `call_later` (None: the event loop's) goes by it.
    """

    def __init__(
        self,
        channels: Channels,
        *,
        give_up_after: float = GIVE_UP_AFTER,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        clock: Callable[[], float] = time.monotonic,
        call_later: CallLater | None = None,
    ) -> None:
        self.channels = channels
        self.delivered = 0
        self.abandoned = 0
        self.pending = 0
        self._outbox = Outbox(_pause, give_up_after=give_up_after, max_bytes=max_pending_bytes)
        self._clock = clock
        self._call_later = call_later
        self._timer: Timer | None = None
        self._timer_due = 0.0
        self._acting = False
        self._stopped = False
        self._loading: set[Parcel] = set()
        self._told: deque[float] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def give_up_after(self) -> float:
        """Seconds after which a response is given up whose hook does not take it."""
        return self._outbox.give_up_after

    @give_up_after.setter
    def give_up_after(self, seconds: float) -> None:
        self._outbox.give_up_after = seconds

    @property
    def pending_bytes(self) -> int:
        """What the pending responses hold, about."""
        return self._outbox.bytes

    def post(
        self,
        url: str,
        response: Response,
        wire: int,
        *,
        extended: bool | None = None,
        origin: Origin | None = None,
        finished: Finished | None = None,
        reload: Reload | None = None,
    ) -> None:
        """Deliver `response` to `url` in generation `wire`, with extension keys if `extended` (None: as
        the response says); returns at once. `origin` is whoever has chosen the URL, as for Channels. Raises
        TypeError for a result that JSON cannot express.

        `finished(error)` is told once, perhaps before this returns: None when the hook has acknowledged, the
        last error when it is given up. What is left at `stop` stays owed: nothing is told of it.

        `reload(loaded)` is for whoever has the response stored. It is never given up for want of room; its
        payload is forgotten, and asked for when it is its turn: call `loaded`, once and in this event loop,
        with what `response.encode` gave for this generation, or None if it is no longer there.
        """
        extended = (response.extended if extended is None else extended) and wire > 1
        payload = response.encode(wire, extended=extended)
        now = self._clock()
        parcel = Parcel((url, origin), response.id, payload, now, wire, extended, finished, reload)
        self.pending += 1
        self._idle.clear()
        if self._stopped or self._outbox.post(parcel, now):
            self._send(parcel)
        if self._outbox.sends or self._outbox.dead:
            self._act()

    async def drained(self) -> None:
        """Wait until nothing is pending."""
        await self._idle.wait()

    def stop(self) -> None:
        """Leave what waits for another try, and try no more. Close the channels afterwards."""
        if self._stopped:
            return
        self._stopped = True
        if self.pending:
            log.warning("%d responses were not delivered", self.pending)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = self._outbox.waiting + len(self._loading)
        self._loading.clear()
        self._outbox.clear()
        for _ in range(left):
            self._finish(None, None)

    def troubled(self) -> list[dict[str, Any]]:
        """The hooks in trouble, those with most responses first: URL (without secrets), responses that wait,
        tries in vain and seconds until the next.
        """
        found = nlargest(
            TOLD_OF, self._outbox.troubled(self._clock()), key=lambda hook: (hook.waiting, hook.failures)
        )
        return [
            {**hook._asdict(), "url": printable(redacted(hook.url)), "next_try": round(hook.next_try, 3)}
            for hook in found
        ]

    # -- tries --------------------------------------------------------------------------------------

    def _act(self) -> None:
        """Do what the outbox has decided. What comes of it at once is done by the same loop."""
        if self._acting:
            return
        self._acting = True
        try:
            while self._outbox.sends or self._outbox.dead:
                sends, dead = self._outbox.take()
                for letter in dead:
                    self._tell_of_dead(letter)
                    self._finish(letter.parcel, letter.error)
                for parcel in sends:
                    if self._stopped:  # by one of the above: it counts no longer as waiting
                        self._finish(None, None)
                    elif parcel.payload is None:
                        self._load(parcel)
                    else:
                        self._send(parcel)
        finally:
            self._acting = False
        self._set_timer()

    def _set_timer(self) -> None:
        when = self._outbox.next_wake()
        if when is None or self._stopped or (self._timer is not None and self._timer_due <= when):
            return  # one that is early does no harm
        if self._timer is not None:
            self._timer.cancel()
        call_later = self._call_later or asyncio.get_running_loop().call_later
        self._timer_due = when
        self._timer = call_later(max(when - self._clock(), 0.0), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._outbox.tick(self._clock())
        self._act()

    def _load(self, parcel: Parcel) -> None:
        """Ask for the payload of one whose turn it is."""
        self._loading.add(parcel)

        def loaded(payload: bytes | None) -> None:
            if parcel not in self._loading:
                return  # stopped, or told twice
            self._loading.discard(parcel)
            if payload is not None:
                self._outbox.loaded(parcel, payload)
                self._send(parcel)
            else:
                error = AcommError("the response is no longer stored")
                self._outbox.unstored(parcel, error, self._clock())
            self._act()

        assert parcel.reload is not None
        try:
            parcel.reload(loaded)
        except Exception:
            log.exception("the response %s could not be loaded", printable(parcel.id))
            loaded(None)

    def _send(self, parcel: Parcel) -> None:
        assert parcel.payload is not None
        wire = parcel.wire
        done = functools.partial(self._done, parcel)
        message = Outgoing(
            parcel.payload, done, wire=wire, extended=parcel.extended, expected=_expected[wire]
        )
        url, origin = parcel.key
        try:
            self.channels.post(url, message, origin)
        except BadRequest as error:
            self._done(parcel, error, nowhere=True)

    def _done(self, parcel: Parcel, error: AcommError | None, nowhere: bool = False) -> None:
        if error is None:
            if not self._stopped:
                self._outbox.delivered(parcel, self._clock())
            self._finish(parcel, None)
            if self._outbox.sends or self._outbox.dead:
                self._act()
            return
        if not self._stopped and self.channels.closed:
            self.stop()
        if self._stopped:
            log.debug("the hook %s has not acknowledged: %s", _shown(parcel), printable(error))
            self._finish(None, None)
            return
        fault = Fault.HOPELESS if nowhere else _fault(error)
        if fault in (Fault.SILENT, Fault.REFUSED):
            parcel.refusals += 1
            if parcel.refusals == 2 and _beyond_the_peer(parcel):
                self._say_how_large(parcel)
        verdict = self._outbox.failed(parcel, error, fault, self._clock())
        if verdict is not None:
            news, pause = verdict
            log.log(
                logging.WARNING if news else logging.DEBUG,
                "the hook %s did not take a response (%s); trying again in %.1f s",
                _shown(parcel),
                printable(error),
                pause,
            )
        self._act()

    def _say_how_large(self, parcel: Parcel) -> None:
        """From now on, deliver an error in place of what the hook cannot read."""
        assert parcel.payload is not None
        size = len(parcel.payload)
        log.warning(
            "the hook %s did not take a response of %d bytes; it gets an error that says so",
            _shown(parcel),
            size,
        )
        error = TooLarge(
            f"the response has {size} bytes, and its hook twice did not take it: a generation 2 peer reads "
            f"up to {SAFE_FOR_GENERATION_2} safely"
        )
        parcel.reload = None  # which would bring what it cannot read
        self._outbox.loaded(parcel, Response(parcel.id, error=error).encode(2, extended=parcel.extended))

    # -- ends ---------------------------------------------------------------------------------------

    def _finish(self, parcel: Parcel | None, error: AcommError | None) -> None:
        """Count one out, and tell whoever posted it: None for one that stays owed."""
        self.pending -= 1
        if parcel is not None and error is None:
            self.delivered += 1
        else:
            self.abandoned += 1
        if not self.pending:
            self._idle.set()
        if parcel is not None and parcel.finished is not None:
            try:
                parcel.finished(error)
            except Exception:
                log.exception("what waited for the delivery of %s failed", printable(parcel.id))

    def _tell_of_dead(self, letter: Dead) -> None:
        """The log tells of hooks, not of responses: whoever names a dead one a thousand times must not fill
        it.
        """
        told = letter.first and (letter.why is not Why.HOPELESS or self._may_tell())
        log.log(
            logging.ERROR if told else logging.DEBUG,
            "gave up on the hook %s: %s",
            _shown(letter.parcel),
            printable(letter.error),
        )

    def _may_tell(self) -> bool:
        """Whether the log has room for one more hook that is given up at the first try: whoever asks may name
        a new one with each request.
        """
        now = self._clock()
        while self._told and self._told[0] <= now - 60.0:
            self._told.popleft()
        if len(self._told) >= _TOLD_A_MINUTE:
            return False
        self._told.append(now)
        if len(self._told) == _TOLD_A_MINUTE:
            log.error("more hooks that are given up at once are not told of within this minute")
        return True


def _pause(failures: int) -> float:
    """Seconds until the next try, after so many failures in a row."""
    from random import uniform  # it costs a tenth of `import acomm`, for what should be rare

    # The exponent has an end, or a hook that is down for days makes it too large for a float.
    pause: float = min(FIRST_BACKOFF * 2 ** min(failures - 1, 20), LONGEST_BACKOFF)
    return pause * uniform(0.5, 1)


def _fault(error: AcommError) -> Fault:
    if isinstance(error, NoAcknowledgement):
        return Fault.SILENT
    if isinstance(error, ConnectionLost):
        return Fault.LOST
    # What the policy forbids, or the hook itself, does not become allowed by asking again.
    return Fault.HOPELESS if isinstance(error, Forbidden) else Fault.REFUSED


def _beyond_the_peer(parcel: Parcel) -> bool:
    """Whether a generation 2 hook may be unable to read this, however often it comes."""
    size = 0 if parcel.payload is None else len(parcel.payload)
    return parcel.wire == 2 and size > SAFE_FOR_GENERATION_2 and unix_path(parcel.key[0]) is not None


def _shown(parcel: Parcel) -> str:
    return printable(redacted(parcel.key[0]))
