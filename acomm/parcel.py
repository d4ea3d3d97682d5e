"""What an outbox is made of: responses on their way, what can become of them, and their hooks. Data alone;
`acomm.outbox` decides.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from acomm.deadlines import Deadlines
from acomm.errors import AcommError

if TYPE_CHECKING:
    from acomm.origin import Origin


OVERHEAD = 1024
"""Bytes that a response counts besides its payload: about what Python keeps of one that waits."""


UNLIMITED = 1 << 60
"""The window of a hook that is not in trouble."""

Key = tuple[str, "Origin | None"]
Finished = Callable[[AcommError | None], None]
Reload = Callable[[Callable[[bytes | None], None]], None]


class State(enum.Enum):
    FLYING = enum.auto()
    READY = enum.auto()
    RESTING = enum.auto()
    BEHIND = enum.auto()
    GONE = enum.auto()


class Fault(enum.Enum):
    """What a failure says. LOST: the hook could not be reached, or did not acknowledge in time. SILENT: it
    took the response and closed without an acknowledgement, which may be for that response. REFUSED: it
    acknowledged with an error. HOPELESS: so that asking again is no use.
    """

    LOST = enum.auto()
    SILENT = enum.auto()
    REFUSED = enum.auto()
    HOPELESS = enum.auto()


class Why(enum.Enum):
    """Why a response is given up: for too long in vain; for want of room; hopeless; its stored payload is
    no longer there.
    """

    EXPIRED = enum.auto()
    DROPPED = enum.auto()
    HOPELESS = enum.auto()
    UNSTORED = enum.auto()


class Parcel:
    """A response for a hook, by URL and origin. Without a payload, `reload` gets it when it is its turn.
    `since` is when it was posted; `refusals` are those failures that came after the hook had it.
    """

    __slots__ = (
        "extended",
        "failures",
        "finished",
        "hook",
        "id",
        "key",
        "payload",
        "refusals",
        "reload",
        "since",
        "size",
        "state",
        "wire",
    )

    hook: Hook

    def __init__(
        self,
        key: Key,
        id: str,
        payload: bytes,
        since: float,
        wire: int = 3,
        extended: bool = False,
        finished: Finished | None = None,
        reload: Reload | None = None,
    ) -> None:
        self.key = key
        self.id = id
        self.payload: bytes | None = payload
        self.size = len(payload) + OVERHEAD
        self.since = since
        self.wire = wire
        self.extended = extended
        self.finished = finished
        self.reload = reload
        self.state = State.FLYING
        self.failures = 0
        self.refusals = 0


class Dead(NamedTuple):
    """A dead letter. `first`: nobody has been told yet that this hook's responses are given up."""

    parcel: Parcel
    error: AcommError
    why: Why
    first: bool


class Trouble(NamedTuple):
    """A hook in trouble: the tries in vain since it began, and the seconds until the next."""

    url: str
    waiting: int
    failures: int
    next_try: float


class Hook:
    """What is pending for one hook. `failures` are those in a row that say that it is in trouble; `failing`
    the pending responses that have failed.
    """

    __slots__ = (
        "active",
        "behind",
        "doubt",
        "due",
        "failing",
        "failures",
        "flying",
        "flying_bytes",
        "held",
        "held_bytes",
        "key",
        "lean",
        "level",
        "plain",
        "probe",
        "ready",
        "resting",
        "told",
        "tries",
        "waiting",
        "warned",
        "when",
        "window",
    )

    active: dict[str, Parcel]  # by id, the first that waits or has waited
    behind: dict[str, deque[Parcel]]  # later ones of the same id
    held: Deadlines[Parcel]  # those that wait with their payload, by `since`
    lean: Deadlines[Parcel]  # those without
    ready: deque[Parcel]  # and such as no longer are
    resting: dict[Parcel, None]

    def __init__(self, key: Key) -> None:
        self.key = key
        self.flying = 0
        self.flying_bytes = 0
        self.plain = True  # all goes well, and none of the rest has been made

    def complicate(self) -> None:
        """Make what only hooks need whose responses wait or fail."""
        self.plain = False
        self.active = {}
        self.behind = {}
        self.held = Deadlines()
        self.lean = Deadlines()
        self.ready = deque()
        self.resting = {}
        self.doubt: Parcel | None = None
        self.due = False
        self.failing = 0
        self.failures = 0
        self.held_bytes = 0
        self.level = 0
        self.probe: Parcel | None = None
        self.told = False
        self.tries = 0
        self.waiting = 0
        self.warned = False
        self.when = 0.0
        self.window = UNLIMITED
