"""Who may be in: how many connections, of each uid how many, and how much of what they send unfinished. Pure.

    enter --> inside --> leave          beyond the limit the one goes that has kept us waiting for longest, if
                |  ^                    any has for long; else the new one
            waits  moves

What is unfinished counts by what it is going to be, as soon as that is known, and not by what has come of it:
else many halves would fill the room, and none of them could ever become whole.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

G = TypeVar("G", bound=Hashable)

COME_BACK = 1.0
"""Seconds after which who was turned away may find room."""

PATIENCE = 1.0
"""Seconds for which a connection may keep us waiting, a message begun or none yet, while others want in."""

SMALL = 4096
"""Bytes of an unfinished message that do not count: ten thousand of them are 40 MB."""

MAX_HELD = 64
"""Connections that wait for room for a large message, each with what has come of it. More are refused."""


class Room(Generic[G]):
    """At most `most` guests, whose unfinished messages may have `unread` bytes; of each uid at most `share`
    of both. `now` is on the event loop's clock.
    """

    def __init__(self, most: int = sys.maxsize, unread: int = sys.maxsize, share: float = 1.0) -> None:
        self.unread = unread
        self.used = 0  # bytes of unfinished messages
        self.shed = 0
        self.refused = 0
        self._share = share
        self.limit(most)
        self._each_unread = int(unread * share) if share < 1 else unread
        self._guests: dict[G, int] = {}
        self._count: Counter[int] = Counter()
        self._waiting: dict[int, dict[G, float]] = {}  # by uid, the one that waits for longest first
        self._unread: Counter[int] = Counter()
        self._held: dict[G, tuple[int, int]] = {}  # uid and bytes

    def limit(self, most: int) -> None:
        """At most so many guests from now on."""
        self.most = most
        self._each = most if self._share == 1 else max(int(most * self._share), 1)

    def __len__(self) -> int:
        return len(self._guests)

    def stats(self) -> dict[str, int]:
        """What is used and what is the most of it, and how many were sent away."""
        return {
            "connections": len(self._guests),
            "max_connections": self.most,
            "unread_bytes": self.used,
            "max_unread_bytes": self.unread,
            "shed": self.shed,
            "refused": self.refused,
        }

    # -- guests -------------------------------------------------------------------------------------

    def enter(self, guest: G, uid: int, now: float) -> None:
        """A guest is in, and we wait for its first message. See `crowded`."""
        self._guests[guest] = uid
        self._count[uid] += 1
        self.waits(guest, now)

    def leave(self, guest: G) -> None:
        """A guest has left, or does not count any more."""
        uid = self._guests.get(guest)
        if uid is None:
            return
        self.moves(guest)
        del self._guests[guest]
        self._count[uid] -= 1
        if not self._count[uid]:
            del self._count[uid]

    def waits(self, guest: G, now: float) -> None:
        """We wait for a guest to say something, or the rest of it."""
        uid = self._guests.get(guest)
        if uid is not None:
            waiting = self._waiting.setdefault(uid, {})
            waiting.pop(guest, None)
            waiting[guest] = now

    def moves(self, guest: G) -> None:
        """We do not wait for it any more."""
        uid = self._guests.get(guest)
        waiting = None if uid is None else self._waiting.get(uid)
        if uid is not None and waiting is not None and waiting.pop(guest, None) is not None and not waiting:
            del self._waiting[uid]

    def crowded(self, uid: int) -> str | None:
        """What is too much since a guest of `uid` has come in; None if all is well."""
        if self._count[uid] > self._each < self.most:
            return f"uid {uid} has {self._each} connections, and more are not taken of one"
        if len(self._guests) > self.most:
            return f"there are {self.most} connections, and more are not taken"
        return None

    def slowest(self, uid: int, now: float) -> G | None:
        """Who should leave for a guest of `uid`: of those that have kept us waiting for too long, the one
        that has for longest; one of its own, if it is of these that there are too many.
        """
        own = self._count[uid] > self._each
        queues = [self._waiting.get(uid, {})] if own else self._waiting.values()
        first = (next(iter(queue.items())) for queue in queues if queue)
        guest, since = min(first, key=lambda item: item[1], default=(None, now))
        return guest if now - since > PATIENCE else None

    # -- unfinished messages ------------------------------------------------------------------------

    def reserve(self, uid: int, size: int) -> bool:
        """Take `size` bytes for a message; False: there is no room now. One message alone always has some."""
        others = self._unread[uid]
        if (self.used and self.used + size > self.unread) or (others and others + size > self._each_unread):
            if not others:
                del self._unread[uid]
            return False
        self.used += size
        self._unread[uid] += size
        return True

    def hold(self, guest: G, uid: int, size: int) -> bool:
        """Have a guest wait for `size` bytes; False: too many do."""
        if len(self._held) >= MAX_HELD:
            return False
        self._held[guest] = uid, size
        return True

    def give_back(self, uid: int, size: int) -> list[G]:
        """What a message had is free again; those that have got room now, in the order in which they came."""
        self.used -= size
        self._unread[uid] -= size
        if not self._unread[uid]:
            del self._unread[uid]
        found = [guest for guest, wanted in self._held.items() if self.reserve(*wanted)]
        for guest in found:
            del self._held[guest]
        return found

    def forget(self, guest: G) -> None:
        """A guest waits for room no more."""
        self._held.pop(guest, None)
