"""What workers print, on its way through the template.

    worker: stdout, stderr --pipes--> Outputs --> our own stdout, stderr
            faulthandler   --pipe-->     |
                                         +-- the last of each, for the receipt of a death

The template reads all pipes whatever else happens, so nobody who prints is ever left waiting but for a slow
reader of the whole (`workers.sinks`). Nothing is stored but the tails: a flood costs time.
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from time import monotonic

from workers.sinks import open_sink
from workers.tails import DUMP, STDERR, STDOUT, Tail, pack

READ = 65536
"""Bytes that are read at once: what a pipe holds."""

_LAST_READS = 32
"""Reads of a dead worker's pipe, into which somebody else may still write."""


class Capture:
    """The pipes of one worker. With `printed` False only faulthandler's: the rest goes straight out."""

    def __init__(self, printed: bool) -> None:
        self.reads: dict[int, Tail] = {}
        self.dump_wanted = False  # for a receipt alone
        self.dumped = False  # since it was wanted
        self._writes: dict[int, int] = {}
        try:
            for stream in (STDOUT, STDERR, DUMP) if printed else (DUMP,):
                read_end, write_end = os.pipe()
                self.reads[read_end] = Tail(stream)
                self._writes[stream] = write_end
                os.set_blocking(read_end, False)
        except OSError:
            self.close()
            raise

    def adopt(self) -> int:
        """In the worker: print into the pipes. Returns the descriptor for faulthandler, close-on-exec."""
        dump = self._writes.pop(DUMP)
        for read_end in self.reads:
            os.close(read_end)
        for stream, write_end in self._writes.items():
            os.dup2(write_end, 1 if stream == STDOUT else 2)
            os.close(write_end)
        if self._writes:
            # A pipe is no terminal, so Python would keep what is printed until there are 8 KiB of it.
            with suppress(AttributeError, ValueError, OSError):
                sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        return dump

    def hand_over(self) -> None:
        """In the template: the worker has the write ends."""
        for write_end in self._writes.values():
            os.close(write_end)
        self._writes.clear()

    def want_dump(self) -> None:
        """What faulthandler writes next has been asked for."""
        self.dump_wanted, self.dumped = True, False

    def close(self) -> None:
        """Close what is open of them."""
        for fd in (*self.reads, *self._writes.values()):
            os.close(fd)
        self.reads.clear()
        self._writes.clear()


class Outputs:
    """All pipes, and where they lead. Descriptors are registered with the template's `poller`."""

    def __init__(self, poller: select.poll, printed: bool) -> None:
        self._poller = poller
        self._printed = printed
        self._sinks = [open_sink(1), open_sink(2)]
        self._captures: set[Capture] = set()
        self._pipes: dict[int, Capture] = {}  # those that have not ended
        self._waiting = [False, False]  # of each sink, whether it is registered
        self._held = [False, False]  # of each, whether those who print into it wait

    def open(self) -> Capture:
        """Pipes for a worker that is to be forked. Raises OSError when there are no descriptors."""
        return Capture(self._printed)

    def watch(self, capture: Capture) -> None:
        """Read them from now on."""
        capture.hand_over()
        self._captures.add(capture)
        for fd, tail in capture.reads.items():
            self._pipes[fd] = capture
            if tail.stream == DUMP or not self._held[tail.stream]:
                self._poller.register(fd, select.POLLIN)

    def leave(self) -> None:
        """In a worker: close what is the template's."""
        for capture in self._captures:
            capture.close()
        for sink in self._sinks:
            sink.close()

    def events(self, ready: list[tuple[int, int]], now: float) -> None:
        """Do what the descriptors that `poller` found ready for; others' are ignored."""
        for fd, _ in ready:
            capture = self._pipes.get(fd)
            if capture is not None:
                stream = capture.reads[fd].stream
                if stream != DUMP and self._sinks[stream].full:
                    continue  # others have just filled it
                if self._read(capture, fd) == b"":
                    self._poller.unregister(fd)  # nobody can write there any more
                    del self._pipes[fd]
            else:
                for sink in self._sinks:
                    if sink.fd == fd:
                        sink.pump(now, writable=True)
        self._arrange(now)

    def _read(self, capture: Capture, fd: int) -> bytes | None:
        """Read and pass on; b"" at the end of the pipe, None if there is nothing now."""
        try:
            data = os.read(fd, READ)
        except BlockingIOError:
            return None
        if data:
            when = monotonic()  # behind the read, so never before it was written
            tail = capture.reads[fd]
            tail.add(data, when)
            if tail.stream != DUMP:
                self._sinks[tail.stream].add(data, when)
            elif capture.dump_wanted:
                capture.dumped = True
            else:
                self._sinks[STDERR].add(data, when)
        return data

    def _arrange(self, now: float) -> None:
        """Watch the sinks that hold something, and hold up those who print into full ones."""
        for stream, sink in enumerate(self._sinks):
            if sink.due is not None and sink.due <= now:
                sink.pump(now)
            if self._waiting[stream] != sink.waiting:
                self._waiting[stream] = sink.waiting
                if sink.waiting:
                    self._poller.register(sink.fd, select.POLLOUT)
                else:
                    self._poller.unregister(sink.fd)
            if self._held[stream] != sink.full:
                self._held[stream] = sink.full
                for fd, capture in self._pipes.items():
                    if capture.reads[fd].stream == stream:
                        if sink.full:
                            self._poller.unregister(fd)
                        else:
                            self._poller.register(fd, select.POLLIN)

    @property
    def due(self) -> float | None:
        """When, on the monotonic clock, `events` is to be called at the latest."""
        return min((sink.due for sink in self._sinks if sink.due is not None), default=None)

    def bury(self, capture: Capture) -> bytes:
        """Its worker is dead: read the rest. Returns the tails, packed."""
        for fd in capture.reads:
            if self._pipes.pop(fd, None) is not None:
                for _ in range(_LAST_READS):
                    if not self._read(capture, fd):
                        break
                with suppress(KeyError):  # it was held up
                    self._poller.unregister(fd)
        self._captures.discard(capture)
        said = pack(piece for tail in capture.reads.values() for piece in tail)
        capture.close()
        self._arrange(monotonic())
        return said

    def finish(self, seconds: float) -> None:
        """Pass on what is left, at the end; each of the two readers gets `seconds`."""
        for capture in list(self._captures):
            self.bury(capture)
        for sink in self._sinks:
            sink.flush(seconds)
