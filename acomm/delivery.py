"""Responses on their way to hooks: tried until acknowledged, or until there is no hope."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from acomm.channel import Channels, NoAcknowledgement, Outgoing
from acomm.errors import AcommError, BadRequest, ConnectionLost, Forbidden, TooLarge, printable
from acomm.messages import Response, ok_ack
from acomm.urls import unix_path

if TYPE_CHECKING:
    from acomm.origin import Origin

log = logging.getLogger("acomm.delivery")

FIRST_BACKOFF = 0.1
LONGEST_BACKOFF = 30.0
GIVE_UP_AFTER = 600.0
"""Seconds. A hook that is down for longer has lost its caller, as nothing here survives a restart."""

SAFE_FOR_GENERATION_2 = 64 * 1024
"""Bytes of a frame. Its peers read a body with one call, which gets what the socket's buffer holds: some
200 KiB at most, and less if they are quick.
"""

_TOLD_A_MINUTE = 10

_expected = {wire: ok_ack(b'""', wire, True) for wire in (1, 2, 3)}


class Delivery:
    """Posts responses to hooks through `channels`, again and again with growing pauses.

    An acknowledgement that carries an error is no delivery. `delivered`, `abandoned` and `pending`
    count responses.
    """

    def __init__(self, channels: Channels, *, give_up_after: float = GIVE_UP_AFTER) -> None:
        self.channels = channels
        self.give_up_after = give_up_after
        self.delivered = 0
        self.abandoned = 0
        self.pending = 0
        self._stopped = False
        self._retries: set[asyncio.TimerHandle] = set()
        self._troubled: Counter[str] = Counter()  # by hook, its responses that have failed
        self._told: deque[float] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    def post(
        self,
        url: str,
        response: Response,
        wire: int,
        *,
        extended: bool | None = None,
        origin: Origin | None = None,
    ) -> None:
        """Deliver `response` to `url` in generation `wire`, with extension keys if `extended` (None: as
        the response says); returns at once. `origin` is whoever has chosen the URL, as for Channels. Raises
        TypeError for a result that JSON cannot express.
        """
        extended = (response.extended if extended is None else extended) and wire > 1
        payload = response.encode(wire, extended=extended)
        self.pending += 1
        self._idle.clear()
        _Attempt(self, url, payload, wire, extended, origin).send()

    async def drained(self) -> None:
        """Wait until nothing is pending."""
        await self._idle.wait()

    def stop(self) -> None:
        """Give up what waits for another try, and try no more. Close the channels afterwards."""
        self._stopped = True
        if self.pending:
            log.warning("%d responses were not delivered", self.pending)
        while self._retries:
            self._retries.pop().cancel()
            self.finished(False)
        self._troubled.clear()

    def failed_first(self, url: str) -> bool:
        """A response has failed for the first time; whether its hook had no other in trouble. The log
        tells of hooks, not of responses: whoever names a dead one a thousand times must not fill it.
        """
        self._troubled[url] += 1
        return self._troubled[url] == 1

    def trouble_ended(self, url: str) -> bool:
        """A response that had failed is delivered or given up; whether it was its hook's last in trouble."""
        self._troubled[url] -= 1
        if self._troubled[url]:
            return False
        del self._troubled[url]
        return True

    def may_tell(self) -> bool:
        """Whether the log has room for one more hook that is given up at the first try: whoever asks may name
        a new one with each request.
        """
        now = time.monotonic()
        while self._told and self._told[0] <= now - 60.0:
            self._told.popleft()
        if len(self._told) >= _TOLD_A_MINUTE:
            return False
        self._told.append(now)
        if len(self._told) == _TOLD_A_MINUTE:
            log.error("more hooks that are given up at once are not told of within this minute")
        return True

    def finished(self, delivered: bool) -> None:
        self.pending -= 1
        if delivered:
            self.delivered += 1
        else:
            self.abandoned += 1
        if not self.pending:
            self._idle.set()


class _Attempt:
    __slots__ = (
        "delivery",
        "extended",
        "failures",
        "origin",
        "payload",
        "refusals",
        "since",
        "timer",
        "url",
        "wire",
    )

    def __init__(
        self, delivery: Delivery, url: str, payload: bytes, wire: int, extended: bool, origin: Origin | None
    ) -> None:
        self.delivery = delivery
        self.url = url
        self.payload = payload
        self.wire = wire
        self.extended = extended
        self.origin = origin
        self.failures = 0
        self.refusals = 0  # of them, those after the hook had the response
        self.since = time.monotonic()
        self.timer: asyncio.TimerHandle | None = None

    def send(self) -> None:
        if self.timer is not None:
            self.delivery._retries.discard(self.timer)
            self.timer = None
        message = Outgoing(
            self.payload, self._done, wire=self.wire, extended=self.extended, expected=_expected[self.wire]
        )
        try:
            self.delivery.channels.post(self.url, message, self.origin)
        except BadRequest as error:
            log.error("no response can be sent to the hook %s: %s", printable(self.url), printable(error))
            self.delivery.finished(False)

    def _done(self, error: AcommError | None) -> None:
        if error is None:
            if self.failures:
                self.delivery.trouble_ended(self.url)
            self.delivery.finished(True)
            return
        if self.delivery._stopped:
            log.debug("the hook %s has not acknowledged: %s", printable(self.url), printable(error))
            self.delivery.finished(False)
            return
        self.failures += 1
        if not isinstance(error, ConnectionLost) or isinstance(error, NoAcknowledgement):
            self.refusals += 1
        first = self.failures == 1 and self.delivery.failed_first(self.url)
        loop = asyncio.get_running_loop()
        # What the policy forbids, or the hook itself, does not become allowed by asking again.
        hopeless = isinstance(error, Forbidden)
        too_late = time.monotonic() - self.since > self.delivery.give_up_after
        if hopeless or too_late or self.delivery.channels.closed:
            told = self.delivery.trouble_ended(self.url) and (not hopeless or self.delivery.may_tell())
            level = logging.ERROR if told else logging.DEBUG
            log.log(level, "gave up on the hook %s: %s", printable(self.url), printable(error))
            self.delivery.finished(False)
            return
        if self.refusals == 2 and self._beyond_the_peer():
            self._say_how_large()
        from random import uniform  # it costs a tenth of `import acomm`, for what should be rare

        # The exponent has an end, or a hook that is down for days makes it too large for a float.
        pause = min(FIRST_BACKOFF * 2 ** min(self.failures - 1, 20), LONGEST_BACKOFF) * uniform(0.5, 1)
        log.log(
            logging.WARNING if first else logging.DEBUG,
            "the hook %s did not take a response (%s); trying again in %.1f s",
            printable(self.url),
            printable(error),
            pause,
        )
        self.timer = loop.call_later(pause, self.send)
        self.delivery._retries.add(self.timer)

    def _beyond_the_peer(self) -> bool:
        """Whether a generation 2 hook may be unable to read this, however often it comes."""
        return (
            self.wire == 2 and len(self.payload) > SAFE_FOR_GENERATION_2 and unix_path(self.url) is not None
        )

    def _say_how_large(self) -> None:
        """From now on, deliver an error in place of what the hook cannot read."""
        size = len(self.payload)
        log.warning(
            "the hook %s did not take a response of %d bytes; it gets an error that says so",
            printable(self.url),
            size,
        )
        error = TooLarge(
            f"the response has {size} bytes, and its hook twice did not take it: a generation 2 peer reads "
            f"up to {SAFE_FOR_GENERATION_2} safely"
        )
        response = Response(Response.decode(self.payload).id, error=error)
        self.payload = response.encode(self.wire, extended=self.extended)
