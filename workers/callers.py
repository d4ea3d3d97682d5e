"""Who waits for which calls, of those that end with their callers (`@task(cancel_on_disconnect=True)`). Pure.

A caller is a connection. The same request may come again on another one, as when a client's connection broke
before it saw the acknowledgement; it then waits at both, and is wanted until both are gone.
"""

from __future__ import annotations

from collections.abc import Hashable

GRACE = 1.0
"""Seconds that a call outlives its connection: a client sends at once again what was not acknowledged."""


class Callers:
    """The calls that have no answer yet, by their requests' ids, with the callers that wait for them."""

    def __init__(self) -> None:
        self.waiting: dict[str, set[Hashable]] = {}
        self._calls: dict[Hashable, set[str]] = {}

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, id: str, caller: Hashable) -> None:
        """`caller` waits for the call `id`."""
        self.waiting.setdefault(id, set()).add(caller)
        self._calls.setdefault(caller, set()).add(id)

    def ended(self, id: str) -> None:
        """The call `id` has its answer."""
        for caller in self.waiting.pop(id, ()):
            calls = self._calls[caller]
            calls.discard(id)
            if not calls:
                del self._calls[caller]

    def left(self, caller: Hashable) -> list[str]:
        """`caller` waits no more: the calls that nobody waits for now."""
        unwanted = []
        for id in self._calls.pop(caller, ()):
            callers = self.waiting[id]
            callers.discard(caller)
            if not callers:
                del self.waiting[id]
                unwanted.append(id)
        return unwanted
