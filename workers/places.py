"""Places for isolated calls: workers that are replaced so that a fresh one is there, and is kept. Pure.

    idle worker --make--> spent, replaced by the pool --fill--> kept --take----> an isolated call
                                                                   +--release--> anybody

A place is made when it is an isolated call's turn, so what fills it is not given to others, not even to calls
that are more urgent: else it might be made again and again. Nothing says whose a place is: the next isolated
call takes it. If there is none any more, all are released.
"""

from __future__ import annotations


class Places:
    """`made` places have no successor yet; `kept` are the successors that nobody has taken."""

    def __init__(self) -> None:
        self.made = 0
        self.kept: list[int] = []

    def __repr__(self) -> str:
        return f"<Places {self.made} made, {len(self.kept)} kept>"

    def make(self) -> None:
        """A worker leaves, and another will come."""
        self.made += 1

    def fill(self, worker: int) -> bool:
        """A worker has come; whether it is kept. Any will do, as whoever leaves is replaced."""
        if not self.made:
            return False
        self.made -= 1
        self.kept.append(worker)
        return True

    def take(self) -> int:
        """An isolated call takes a kept worker, the one that has waited longest."""
        return self.kept.pop(0)

    def release(self) -> list[int]:
        """No isolated call waits: the workers that were kept for one."""
        released, self.kept = self.kept, []
        return released

    def lose(self, worker: int) -> None:
        """A worker is dead or dying."""
        if worker in self.kept:
            self.kept.remove(worker)
