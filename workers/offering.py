"""What the doors know of the service behind them: how requests are offered, and how it tells what becomes of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from acomm.accepted import Accepted
from acomm.messages import Request, Response
from acomm.origin import Origin
from acomm.tracker import Tracker
from workers.callers import Callers
from workers.config import Config
from workers.errors import AcommError
from workers.registry import Registry

Resolve = Callable[[Response], None]
"""Told the response to a request."""


class Decided(Protocol):
    """Told, at once or later, that a request was accepted, and where it then stood if there is anything to
    tell; or why it was refused.
    """

    def __call__(self, refusal: AcommError | None, accepted: Accepted | None = None, /) -> None: ...


class Service(Protocol):
    """What the doors know of the supervisor."""

    config: Config
    tracker: Tracker
    callers: Callers

    @property
    def registry(self) -> Registry: ...

    def offer(
        self,
        request: Request,
        origin: Origin,
        decided: Decided,
        resolve: Resolve | None = None,
        message: bytes | None = None,
    ) -> None:
        """Take a request, or say why not: see `Supervisor.offer`."""

    def is_answered(self, id: str) -> bool:
        """Whether a request has had its answer just now, so that there is none to wait for."""

    def refused(self, error: AcommError) -> None:
        """Count a refusal."""

    def caller_left(self, caller: Hashable) -> None:
        """Cancel the calls that nobody waits for any more."""

    def unready(self) -> str | None:
        """Why no work is taken now; None if it is."""
