"""A generation of worker processes: those that are forked from one template, and so run the same code.

    loading --first worker ready--> current --replaced by a newer one--> past --last worker gone--> ending
       |                                                                                              ^
       +------ does not import, first worker dies, or a newer one is wanted --------------------------+

Each has a scoreboard of its own, so that a past one, whose calls may take long, is in nobody's way.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.forkserver import ForkServer
from workers.scoreboard import Scoreboard

END_TIMEOUT = 5.0
"""Seconds that a template without workers has to exit by itself: an import in C code may not let it."""


class Generation:
    """A fork server, its scoreboard, and the `modules` and `paths` that its workers take their tasks from.

    `due` is when its template is killed, once that has been told to exit.
    """

    def __init__(
        self,
        modules: Sequence[str],
        paths: Sequence[str],
        *,
        slots: int,
        places: int,
        target: str,
        cleanup: Sequence[str],
        capture: bool,
    ) -> None:
        self.modules = tuple(modules)
        self.paths = tuple(paths)
        self.due: float | None = None
        self.scoreboard = Scoreboard.create(slots, places)
        self.server = ForkServer(
            [target.partition(":")[0], *modules], paths=paths, target=target, cleanup=cleanup, capture=capture
        )
        try:
            self.server.start()
        except BaseException:
            self.scoreboard.close()
            raise

    def __repr__(self) -> str:
        return f"<Generation of {', '.join(self.modules) or 'no modules'}, {self.server!r}>"

    def free_slot(self, taken: set[int]) -> int | None:
        """A slot that is not `taken`."""
        return next((slot for slot in range(self.scoreboard.slots) if slot not in taken), None)

    def end(self, now: float) -> None:
        """Have the template exit; `Gone` follows. What it has forked is killed."""
        if self.due is None:
            self.due = now + END_TIMEOUT
            self.server.dismiss()

    def close(self) -> None:
        """Kill all that is left."""
        self.server.close()
        self.scoreboard.close()


def dues(generations: Sequence[Generation]) -> list[float]:
    """When templates are to be killed that have been told to exit."""
    return [generation.due for generation in generations if generation.due is not None]
