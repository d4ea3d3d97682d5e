"""When dead workers may be replaced: at once, later, or not before somebody has looked. Pure."""

from __future__ import annotations


class RestartBudget:
    """How many early deaths may follow each other, each within `period` seconds of the one before. To count
    those within one period, as OTP's supervisors do, would spare workers that take a second to die.

    Only early deaths are noted: before a worker was ready, or before it had anything to run. Those do
    not end by themselves when the cause is the code or the machine. Workers that die later are replaced
    at once and for free, and so are those that a call has killed: that call pays for it.
    """

    def __init__(self, intensity: int, period: float = 10.0, *, first_pause: float = 0.02) -> None:
        self.intensity = intensity
        self.period = period
        self.first_pause = first_pause
        self._deaths = 0
        self._last = 0.0

    def note(self, now: float) -> None:
        """A worker has died early."""
        self._forget(now)
        self._deaths += 1
        self._last = now

    def recovered(self) -> None:
        """A new worker has finished a first call: whatever killed the others, it is no loop."""
        self._deaths = 0

    def exhausted(self, now: float) -> bool:
        """Whether more workers died early, one after the other, than is normal in any good day."""
        self._forget(now)
        return self._deaths > self.intensity

    def pause(self, now: float) -> float:
        """Seconds to wait before the next start: none after a single death, then growing; a whole period
        once the budget is exhausted.
        """
        self._forget(now)
        if self._deaths > self.intensity:
            return self.period
        return 0.0 if self._deaths < 2 else min(self.first_pause * 2.0 ** (self._deaths - 2), 1.0)

    def _forget(self, now: float) -> None:
        if now - self._last >= self.period:
            self._deaths = 0
