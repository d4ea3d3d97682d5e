"""A message on its way to a URL, what its acknowledgement says, and what channels to URLs have in common."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from acomm.acks import ok_ack
from acomm.errors import AcommError, BadRequest, ConnectionLost, Unreachable, alone, printable
from acomm.messages import Response

if TYPE_CHECKING:
    import aiohttp

    from acomm.egress import Policy
    from acomm.origin import Origin

log = logging.getLogger("acomm.channel")

_NOBODY_THERE = (FileNotFoundError, ConnectionRefusedError)

_plain_acks = {ok_ack(b'""', wire, False) for wire in (2, 3)}
"""What a tracker says to a response, ours and the original's."""


Delivered = Callable[[AcommError | None], None]


class NoAcknowledgement(ConnectionLost):
    """The peer took the connection, and closed it without an acknowledgement."""


class Outgoing:
    """A message on its way. `delivered(error)` is called once: with None when it was acknowledged, else
    with the acknowledgement's error, or ConnectionLost when none came.

    `expected` is how the acknowledgement that we expect begins, byte for byte, which spares decoding it;
    `ack` is the one that came, as it was.
    """

    __slots__ = ("ack", "deadline", "delivered", "expected", "extended", "payload", "sends", "wire")

    def __init__(
        self,
        payload: bytes,
        delivered: Delivered,
        *,
        wire: int,
        extended: bool,
        expected: bytes | None = None,
    ) -> None:
        self.payload = payload
        self.delivered = delivered
        self.wire = wire
        self.extended = extended
        self.expected = expected
        self.ack = b""
        self.sends = 0
        self.deadline = 0.0

    def settle(self, error: AcommError | None) -> None:
        """Tell the sender. What its callback raises is its own affair, and must not hit the others."""
        try:
            self.delivered(error)
        except Exception:
            log.exception("what waited for an acknowledgement failed")


class Owner(Protocol):
    """What a channel knows of whoever has it: see `acomm.channel.Channels`."""

    timeout: float
    policy: Policy | None
    granting: OrderedDict[str, bool]
    broken: Callable[[str], None] | None
    storing: set[str]
    headers: dict[str, dict[str, str]]
    closed: bool

    def learned(self, url: str, granting: bool) -> None:
        """Remember whether the peer at `url` grants channels."""

    def http(self, origin: Origin | None) -> aiohttp.ClientSession:
        """The session for URLs of `origin`."""

    def idle(self, channel: Channel) -> None:
        """Forget a channel that has nothing to keep."""


class Channel:
    """What both kinds share: a URL, the tasks under way, and their end. `limit`: so many at a time."""

    limit: int

    def __init__(self, owner: Owner, url: str, origin: Origin | None) -> None:
        self.owner = owner
        self.url = url
        self.origin = origin
        self.queue: deque[Outgoing] = deque()
        self.tasks: dict[asyncio.Task[AcommError | None], Outgoing] = {}

    def post(self, message: Outgoing) -> None:
        raise NotImplementedError

    def start(self, message: Outgoing) -> None:
        """Send one message by a task of its own."""
        task = asyncio.get_running_loop().create_task(self._run(message))
        self.tasks[task] = message
        task.add_done_callback(self._finished)

    async def exchange(self, message: Outgoing) -> AcommError | None:
        """Send the message; the error of its acknowledgement. Raises AcommError, OSError."""
        raise NotImplementedError

    async def _run(self, message: Outgoing) -> AcommError | None:
        try:
            return await self.exchange(message)
        except AcommError as error:
            return alone(error)  # it may be an answer, which is remembered for minutes, and not the message
        except TimeoutError:
            return ConnectionLost(f"no acknowledgement from {printable(self.url)} in time")
        except OSError as error:
            return unreachable(self.url, error, sent=message.sends > 1)
        except Exception as error:
            log.exception("sending to %s failed unexpectedly", printable(self.url))
            return ConnectionLost(f"cannot reach {printable(self.url)}: {type(error).__name__}: {error}")

    def _finished(self, task: asyncio.Task[AcommError | None]) -> None:
        message = self.tasks.pop(task)
        if task.cancelled():
            message.settle(ConnectionLost("the sender was closed before the acknowledgement came"))
        else:
            message.settle(task.result())
        self.more()

    @property
    def under_way(self) -> int:
        """Messages that have been sent, or are being sent, on a connection of their own."""
        return len(self.tasks)

    def more(self) -> None:
        """Something has ended: start what waits, or be forgotten."""
        while self.queue and self.under_way < self.limit:
            self.start(self.queue.popleft())
        self.rest()

    def rest(self) -> None:
        """Be forgotten by the owner if there is nothing to keep."""
        if not self.under_way and not self.queue:
            self.owner.idle(self)

    async def close(self) -> None:
        while self.queue:
            self.queue.popleft().settle(ConnectionLost("the sender was closed"))
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def unreachable(url: str, error: Exception, *, sent: bool) -> ConnectionLost:
    """Unreachable if nobody is there, unless the message was sent before: on a connection that broke, it may
    have been taken.
    """
    reason = getattr(error, "strerror", None) or error
    kind = Unreachable if isinstance(error, _NOBODY_THERE) and not sent else ConnectionLost
    return kind(f"cannot reach {printable(url)}: {reason}")


def ack_error(message: bytes) -> tuple[bool, AcommError | None]:
    """Whether an acknowledgement grants a channel, and the error it carries."""
    if message in _plain_acks:
        return False, None
    try:
        ack = Response.decode(message)
    except BadRequest as error:
        return False, ConnectionLost(f"the acknowledgement is not readable: {error}")
    return ack.extended, ack.error
