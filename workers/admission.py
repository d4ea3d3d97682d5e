"""Which requests are taken: so many at a time, with so many bytes of arguments, and of nobody too large a
part.

    check --> (accepted) take --> ... --> release        what was accepted and has not ended counts:
       |                                                 that which waits, and that which runs
       +--> Busy, retry_after

Nothing waits here. But who comes back at once is turned away again, and so would all be who are told the
same moment. So each is told a time of his own: places become free one after the other, every `gap` seconds,
and each who is turned away is told the time of a further one, which is kept for him (`promises`).

Pure, without a clock, and all of it in a time that hardly depends on how many requests there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

from workers.errors import Busy, TooLarge
from workers.promises import Promise, Promises

UNKNOWN = 1.0
"""Seconds to stay away, while nothing is known of how long calls take."""

MARGIN = 0.05
"""How wrong a forecast is, as a part of its time, often enough."""

SHORTEST = 0.02
LONGEST = 3600.0
"""Seconds to stay away at least, as coming back costs something too, and at most."""


class Account:
    """What is under way of one caller, or of all, and the places that were promised to those that were turned
    away.
    """

    __slots__ = ("name", "promises", "requests", "size")

    def __init__(self, name: str, promises: Promises) -> None:
        self.name = name
        self.promises = promises
        self.requests = 0
        self.size = 0


class Admission:
    """At most `requests` are under way, with `size` bytes of arguments, and of each caller at most `share` of
    both.
    """

    def __init__(self, requests: int, size: int, share: float = 1.0) -> None:
        self.requests = requests
        self.size = size
        self.total = Account("all", Promises(requests, size))
        self.refused = 0
        self._each = max(int(requests * share), 1)
        self._each_size = int(size * share)
        self._accounts: dict[Hashable, Account] = {}

    def stats(self) -> dict[str, float]:
        """What is under way, what is the most of it, for all and for one caller, and how many were
        refused.
        """
        return {
            "requests": self.total.requests,
            "max_queued": self.requests,
            "bytes": self.total.size,
            "max_queued_bytes": self.size,
            "max_each": self._each,
            "refused": self.refused,
        }

    def account(self, caller: Hashable) -> Account:
        """The account of a caller: of one uid, or of all those that one share is for."""
        account = self._accounts.get(caller)
        if account is None:
            account = self._accounts[caller] = Account(str(caller), Promises(self._each, self._each_size))
        return account

    def check(
        self, account: Account, size: int, now: float, gap: Callable[[], float | None], id: str = ""
    ) -> None:
        """Whether the request `id` with `size` bytes of arguments may be taken. Raises Busy, with an honest
        `retry_after`, and TooLarge for one that could never be.

        `gap` tells the seconds from one end of a call to the next, None if that is not known. It is asked
        only if the request is turned away.
        """
        total = self.total
        if (
            total.requests < self.requests
            and account.requests < self._each
            and total.size + size <= self.size
            and account.size + size <= self._each_size
            and (not (total.promises or account.promises) or self._may_have_room(account, size, now, id))
        ):
            return
        self.refused += 1
        if size > self._each_size:
            raise TooLarge(
                f"the arguments have {size} bytes, and all that a caller has under way may have "
                f"{self._each_size} (max_queued_bytes)"
            )
        raise self._busy(account, size, now, gap(), id)

    def _may_have_room(self, account: Account, size: int, now: float, id: str) -> bool:
        """Whether there is room beside what was promised to others."""
        for holder, most, most_size in self._limits(account):
            places, rest = most - holder.requests, most_size - holder.size - size
            if not holder.promises.leave_room(id, places, rest, now):
                return False
        self.total.promises.redeem(id)
        account.promises.redeem(id)
        return True

    def _limits(self, account: Account) -> tuple[tuple[Account, int, int], ...]:
        return (self.total, self.requests, self.size), (account, self._each, self._each_size)

    def take(self, account: Account, size: int) -> None:
        """A request is under way."""
        total = self.total
        total.requests += 1
        total.size += size
        account.requests += 1
        account.size += size

    def release(self, account: Account, size: int) -> None:
        """A request has ended."""
        total = self.total
        total.requests -= 1
        total.size -= size
        account.requests -= 1
        account.size -= size

    def _busy(self, account: Account, size: int, now: float, gap: float | None, id: str) -> Busy:
        total = self.total
        pause = 0.0
        reason = ""
        # Of the caller's own requests so much fewer end.
        slower = total.requests / account.requests if account.requests else 1.0
        for holder, most, most_size in self._limits(account):
            ends = _ends(holder, size, most, most_size)
            kept = not ends and not holder.promises.leave_room(
                id, most - holder.requests, most_size - holder.size - size, now
            )
            if ends or kept:
                each = None if gap is None else gap * (slower if holder is account else 1.0)
                longer = UNKNOWN if each is None else _promise(holder, max(ends, 1), each, now, id, size)
                pause = max(pause, longer)
                reason = reason or _reason(holder, most, most_size, by_caller=holder is account, kept=kept)
        return Busy(reason, retry_after=round(min(max(pause, SHORTEST), LONGEST), 3))


def _ends(holder: Account, size: int, most: int, most_size: int) -> int:
    """How many of the holder's requests have to end until there is room."""
    ends = max(holder.requests - most + 1, 0)
    excess = holder.size + size - most_size
    if excess > 0:
        ends = max(ends, math.ceil(excess * holder.requests / holder.size))
    return ends


def _promise(holder: Account, ends: int, gap: float, now: float, id: str, size: int) -> float:
    """Seconds until there will likely be a place that was promised to nobody else. Ends come by chance, so
    that of `n` of them takes some `sqrt(n)` of their gaps more than is expected often enough.
    """
    if gap <= 0:
        return 0.0
    promises = holder.promises
    rest = promises.rest(id, now)
    if rest is not None:  # it comes early
        return rest
    # Who is in time, and whose place is late, stands before those who are yet to come.
    others = promises.due if promises.is_due(id, now) else len(promises)
    before = others * promises.returning
    when = (before + ends) * gap
    pause = when * (1 + MARGIN) + gap * (1 + math.sqrt(before + ends))
    promises.keep(id, Promise(now + when, now + pause, size))
    return pause


def _reason(holder: Account, most: int, most_size: int, *, by_caller: bool, kept: bool) -> str:
    whose = f"requests of {holder.name}" if by_caller else "requests"
    part = " for one caller" if by_caller else ""
    if kept:
        return f"the places that are free were promised to others{part}, who come back"
    if holder.requests >= most:
        return f"{holder.requests} {whose} are under way, and {most} is the most{part} (max_queued)"
    return (
        f"the arguments of the {whose} under way have {holder.size} bytes, and {most_size} is the most{part} "
        "(max_queued_bytes)"
    )
