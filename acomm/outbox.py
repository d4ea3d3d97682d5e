"""Which response goes to its hook now, which waits, and which is given up: pure, with the time passed in.

    post --> flying ---------- acknowledged --> gone
               ^  |
               |  +-- failed --> resting --+      its own pause
               |                           v
               +------ ready <-------------+      waits for its hook: one probe at a time while the hook
                                                  is in trouble, then more and more at once

A hook is in trouble when it cannot be reached or does not acknowledge. Then its responses wait, and one of
them at a time is its probe, after pauses that grow. The first sign of life lets the others go. What it
refuses by an acknowledgement is that response's own affair: it rests, and the others pass it by.

Nothing here knows what a hook is, but for its key. While all goes well a hook is two counters, and nothing
when nothing of it is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from acomm.deadlines import Deadlines
from acomm.errors import AcommError
from acomm.parcel import OVERHEAD, UNLIMITED, Dead, Fault, Hook, Key, Parcel, State, Trouble, Why

MAX_FLYING_BYTES = 16 * 1024 * 1024
"""Bytes under way to one hook, beyond which its responses wait here: a hook that never acknowledges must not
hold memory that nobody can drop. Ours acknowledge within a millisecond, so it slows none of them.
"""

MAX_PROBES = 256
"""Probes under way at a time. Each of a hook that takes connections and says nothing holds a descriptor
for as long as the channels have patience, and whoever makes requests may name any number of those.
"""

WINDOW = 64
"""Responses under way at once to a hook that was in trouble, until so many in a row have got through."""

_ALIKE = 64  # hooks with about as many bytes that are compared exactly


class Outbox:
    """The pending responses of all hooks.

    What there is to do collects in `sends` and `dead`; `take` hands it over. Whoever sends tells
    `delivered` or `failed`, once a send. `pause(n)` is how many seconds to wait after `n` failures in a
    row; `give_up_after` is in seconds, `max_bytes` what all pending responses may hold.
    """

    def __init__(
        self,
        pause: Callable[[int], float],
        *,
        give_up_after: float,
        max_bytes: int,
        max_probes: int = MAX_PROBES,
        max_flying_bytes: int = MAX_FLYING_BYTES,
    ) -> None:
        self.give_up_after = give_up_after
        self.max_bytes = max_bytes
        self.bytes = 0
        self.sends: list[Parcel] = []
        self.dead: list[Dead] = []
        self._pause = pause
        self._max_probes = max_probes
        self._max_flying_bytes = max_flying_bytes
        self._hooks: dict[Key, Hook] = {}
        self._probing = 0
        self._probes: deque[Hook] = deque()  # due; some no longer are
        self._tries: Deadlines[Hook] = Deadlines()
        self._rests: Deadlines[Parcel] = Deadlines()
        self._levels: dict[int, dict[Hook, None]] = {}  # by the bit length of what they hold

    def __len__(self) -> int:
        """Hooks that have something pending."""
        return len(self._hooks)

    @property
    def waiting(self) -> int:
        """How many are not under way."""
        waiting = sum(hook.waiting for hook in self._hooks.values() if not hook.plain)
        return waiting + len(self.sends) + len(self.dead)

    # -- what has happened --------------------------------------------------------------------------

    def post(self, parcel: Parcel, now: float) -> bool:
        """A new response: whether it is to be sent at once. If not, it waits."""
        hook = self._hooks.get(parcel.key)
        if hook is None:
            hook = self._hooks[parcel.key] = Hook(parcel.key)
        parcel.hook = hook
        size = parcel.size
        self.bytes += size
        at_once = hook.plain and (not hook.flying or hook.flying_bytes + size <= self._max_flying_bytes)
        if at_once:
            hook.flying += 1
            hook.flying_bytes += size
        else:
            if hook.plain:
                hook.complicate()
            self._wait(hook, parcel)
            self._go_on(hook, now)
        if self.bytes > self.max_bytes:
            self._trim()
        return at_once

    def delivered(self, parcel: Parcel, now: float) -> None:
        """It was acknowledged."""
        hook = parcel.hook
        if hook.plain:
            self.bytes -= parcel.size
            hook.flying -= 1
            hook.flying_bytes -= parcel.size
            if not hook.flying:
                del self._hooks[hook.key]
            return
        self._land(parcel)
        self._reached(hook)
        self._settle(parcel)
        self._go_on(hook, now)

    def failed(
        self, parcel: Parcel, error: AcommError, fault: Fault, now: float
    ) -> tuple[bool, float] | None:
        """It was sent in vain: whether that is news of its hook, and the seconds until the next try.
        None when it is given up.
        """
        hook = parcel.hook
        if hook.plain:
            hook.complicate()
        probe = hook.probe is parcel
        self._land(parcel)
        parcel.failures += 1
        hook.failing += parcel.failures == 1
        pause = self._pause(parcel.failures)
        if fault is Fault.LOST:
            worse = probe or not hook.failures
            blamed = worse  # what was under way besides only shares its hook's trouble
        elif fault is Fault.SILENT:
            # One response that it chokes on is not the hook's trouble; a second one is.
            worse = probe or (not hook.failures and hook.doubt not in (None, parcel))
            blamed = True
            hook.doubt = parcel
        else:
            worse, blamed = False, True
            self._reached(hook)
        hook.tries += blamed
        if worse:
            hook.failures += 1
            pause = self._pause(hook.failures)
            hook.when = now + pause
            self._tries.set(hook, hook.when)
        hopeless = fault is Fault.HOPELESS
        given_up = hopeless or now - parcel.since > self.give_up_after
        if given_up:
            self._bury(parcel, error, Why.HOPELESS if hopeless else Why.EXPIRED)
        else:
            self._wait(hook, parcel, now + self._pause(parcel.failures) if blamed else None)
        if worse:
            self._expire(hook, error, now)
        news = not hook.warned and not given_up
        hook.warned = hook.warned or news
        self._go_on(hook, now)
        if self.bytes > self.max_bytes:
            self._trim()
        return None if given_up else (news, pause)

    def loaded(self, parcel: Parcel, payload: bytes) -> None:
        """The payload of one that is to be sent: its stored one, or another in its place."""
        size = len(payload) + OVERHEAD
        self.bytes += size - (0 if parcel.payload is None else parcel.size)
        parcel.hook.flying_bytes += size - parcel.size
        parcel.payload, parcel.size = payload, size
        if self.bytes > self.max_bytes:
            self._trim()

    def unstored(self, parcel: Parcel, error: AcommError, now: float) -> None:
        """The payload of one that is to be sent is no longer stored."""
        hook = parcel.hook
        if hook.probe is parcel:
            hook.when = now  # nothing was learned of the hook
        self._land(parcel)
        self._bury(parcel, error, Why.UNSTORED)
        self._go_on(hook, now)

    def tick(self, now: float) -> None:
        """The time has come that `next_wake` said."""
        for hook in self._tries.expired(now):
            hook.due = True
            self._probes.append(hook)
        rested = self._rests.expired(now)
        for parcel in rested:  # all of them first, as a probe takes one that rests only for want of others
            parcel.state = State.READY
            del parcel.hook.resting[parcel]
            parcel.hook.ready.append(parcel)
        for hook in {parcel.hook: None for parcel in rested}:
            self._go_on(hook, now)
        self._start_probes()

    def next_wake(self) -> float | None:
        """When to call `tick`."""
        first, second = self._tries.next(), self._rests.next()
        return second if first is None else first if second is None else min(first, second)

    def take(self) -> tuple[list[Parcel], list[Dead]]:
        """What to send (one without a payload is to be reloaded first) and what was given up."""
        work = self.sends, self.dead
        self.sends, self.dead = [], []
        return work

    def clear(self) -> None:
        """Forget everything."""
        for parcels in (self._hooks, self._levels, self._probes, self.sends, self.dead):
            parcels.clear()
        self._tries, self._rests = Deadlines(), Deadlines()
        self._probing = self.bytes = 0

    def troubled(self, now: float) -> Iterator[Trouble]:
        """The hooks in trouble, in no order."""
        for hook in self._hooks.values():
            if not hook.plain and (hook.failures or hook.failing):
                yield Trouble(hook.key[0], hook.waiting, hook.tries, max(self._next_try(hook) - now, 0.0))

    def _next_try(self, hook: Hook) -> float:
        if hook.failures:
            return 0.0 if hook.probe is not None else hook.when
        return min((self._rests.when(parcel) for parcel in hook.resting), default=0.0)

    # -- waiting ------------------------------------------------------------------------------------

    def _wait(self, hook: Hook, parcel: Parcel, until: float | None = None) -> None:
        """Have it wait for its hook, and before that until a time of its own."""
        hook.waiting += 1
        if parcel.payload is None:
            hook.lean.set(parcel, parcel.since)
        else:
            hook.held.set(parcel, parcel.since)
            self._hold(hook, parcel.size)
        # Who has no id, as its request was not readable, has nothing to keep in order.
        if parcel.id and hook.active.setdefault(parcel.id, parcel) is not parcel:
            parcel.state = State.BEHIND
            hook.behind.setdefault(parcel.id, deque()).append(parcel)
        elif until is None:
            parcel.state = State.READY
            hook.ready.append(parcel)
        else:
            parcel.state = State.RESTING
            hook.resting[parcel] = None
            self._rests.set(parcel, until)

    def _wait_no_more(self, hook: Hook, parcel: Parcel) -> None:
        """It flies or is gone. What is ready has left its queue, or is left out there later."""
        hook.waiting -= 1
        if parcel.payload is None:
            hook.lean.discard(parcel)
        else:
            hook.held.discard(parcel)
            self._hold(hook, -parcel.size)
        if parcel.state is State.RESTING:
            hook.resting.pop(parcel, None)
            self._rests.discard(parcel)
        elif parcel.state is State.BEHIND:
            hook.behind[parcel.id].remove(parcel)

    def _first_ready(self, hook: Hook) -> Parcel | None:
        ready = hook.ready
        while ready and ready[0].state is not State.READY:
            ready.popleft()
        return ready[0] if ready else None

    def _launch(self, hook: Hook, parcel: Parcel) -> None:
        self._wait_no_more(hook, parcel)
        parcel.state = State.FLYING
        hook.flying += 1
        hook.flying_bytes += parcel.size
        self.sends.append(parcel)

    def _land(self, parcel: Parcel) -> None:
        hook = parcel.hook
        hook.flying -= 1
        hook.flying_bytes -= parcel.size
        if hook.probe is parcel:
            hook.probe = None
            self._probing -= 1

    def _go_on(self, hook: Hook, now: float) -> None:
        """Something about the hook has changed: do what can be done."""
        if hook.failures:
            if hook.waiting and hook.probe is None and not hook.due and hook not in self._tries:
                self._tries.set(hook, max(hook.when, now))
        else:
            while hook.flying < hook.window and (parcel := self._first_ready(hook)) is not None:
                if hook.flying and hook.flying_bytes + parcel.size > self._max_flying_bytes:
                    break
                hook.ready.popleft()
                self._launch(hook, parcel)
        self._start_probes()
        self._look_idle(hook)

    def _look_idle(self, hook: Hook) -> None:
        """Forget a hook without anything pending, and its trouble when that is over."""
        if hook.plain or hook.waiting:
            return
        if not hook.flying:
            self._reached(hook)  # nobody is left to find out
            del self._hooks[hook.key]
        elif not hook.failures and not hook.failing:
            hook.warned = hook.told = False
            hook.tries = 0
            hook.plain = hook.window == UNLIMITED and not hook.active

    # -- trouble ------------------------------------------------------------------------------------

    def _reached(self, hook: Hook) -> None:
        """The hook has shown that it lives."""
        hook.doubt = None
        if hook.failures:
            hook.failures = 0
            hook.window = hook.flying + 2  # what hangs since before must not hold up the rest
            hook.due = False
            self._tries.discard(hook)
            if hook.probe is not None:
                hook.probe = None
                self._probing -= 1
        elif hook.window != UNLIMITED:
            hook.window = hook.window + 1 if hook.window < WINDOW else UNLIMITED

    def _start_probes(self) -> None:
        while self._probes and self._probing < self._max_probes:
            hook = self._probes.popleft()
            if not hook.due:
                continue
            hook.due = False
            parcel = self._first_ready(hook)
            if parcel is not None:
                hook.ready.popleft()
            elif hook.resting:
                parcel = next(iter(hook.resting))
            else:
                continue  # all that is left is under way
            hook.probe = parcel
            self._probing += 1
            self._launch(hook, parcel)

    # -- ends ---------------------------------------------------------------------------------------

    def _settle(self, parcel: Parcel) -> None:
        """It is gone, delivered or not: let go what waited behind it."""
        hook = parcel.hook
        parcel.state = State.GONE
        if parcel.payload is not None:
            self.bytes -= parcel.size
        parcel.payload = None
        hook.failing -= parcel.failures > 0
        if hook.active.get(parcel.id) is not parcel:
            return
        del hook.active[parcel.id]
        if behind := hook.behind.get(parcel.id):
            follower = behind.popleft()
            hook.active[parcel.id] = follower
            follower.state = State.READY
            hook.ready.append(follower)
        if not behind:
            hook.behind.pop(parcel.id, None)

    def _bury(self, parcel: Parcel, error: AcommError, why: Why) -> None:
        """Give up one that has landed, or has waited."""
        hook = parcel.hook
        if parcel.state is not State.FLYING:
            self._wait_no_more(hook, parcel)
        self._settle(parcel)
        self.dead.append(Dead(parcel, error, why, not hook.told))
        hook.told = True
        if len(hook.ready) > 2 * hook.waiting + 64:
            hook.ready = deque(ready for ready in hook.ready if ready.state is State.READY)

    def _expire(self, hook: Hook, error: AcommError, now: float) -> None:
        """Give up what has waited for too long. A failed try of the hook is the occasion, and not the clock
        alone: who was stopped for an hour asks once more.
        """
        for parcels in (hook.held, hook.lean):
            while (parcel := parcels.first()) is not None and now - parcel.since > self.give_up_after:
                self._bury(parcel, error, Why.EXPIRED)

    def _hold(self, hook: Hook, size: int) -> None:
        """Payloads of a hook wait, or no longer do. Its level is its place among those that hold most."""
        hook.held_bytes += size
        level = hook.held_bytes.bit_length()
        if level == hook.level:
            return
        if hook.level:
            alike = self._levels[hook.level]
            del alike[hook]
            if not alike:
                del self._levels[hook.level]
        if level:
            self._levels.setdefault(level, {})[hook] = None
        hook.level = level

    def _trim(self) -> None:
        """There is too much: of the hook that holds most, the oldest that wait go, or at least their payloads
        if they are stored. What is under way is not touched.
        """
        while self.bytes > self.max_bytes and self._levels:
            # As many as there may be with about as much: the exact one is not worth a search among thousands.
            hook = max(islice(self._levels[max(self._levels)], _ALIKE), key=lambda hook: hook.held_bytes)
            parcel = hook.held.first()
            assert parcel is not None
            if parcel.reload is None:
                text = f"more than {self.max_bytes} bytes of responses wait for their hooks"
                self._bury(parcel, AcommError(text), Why.DROPPED)
                self._go_on(hook, hook.when)  # it may have kept another of its id back
            else:
                hook.held.discard(parcel)
                self._hold(hook, -parcel.size)
                self.bytes -= parcel.size
                parcel.payload = None
                hook.lean.set(parcel, parcel.since)
