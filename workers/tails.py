"""The last of what a worker wrote: bounded, dated, packed for the way from template to supervisor. Pure."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

STDOUT, STDERR, DUMP = range(3)
"""What workers write to. DUMP is faulthandler's: the Python stack at a fatal signal, or when asked for."""

TAIL = 8192
"""Bytes that are kept of each."""

PIECES = 256
"""Pieces that are kept of each: what was read at once is one."""

_PIECE = struct.Struct("=BdI")


class Said(NamedTuple):
    """A piece of output, and when it was read, on the monotonic clock: some time after it was written."""

    stream: int
    when: float
    data: bytes


class Tail:
    """The last TAIL bytes of one stream, in at most PIECES pieces."""

    __slots__ = ("_pieces", "_size", "stream")

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self._pieces: deque[Said] = deque()
        self._size = 0

    def __repr__(self) -> str:
        return f"<Tail {self._size} bytes in {len(self._pieces)} pieces>"

    def __iter__(self) -> Iterator[Said]:
        return iter(self._pieces)

    def add(self, data: bytes, when: float) -> None:
        """Keep `data`, and let go of what is too much."""
        data = data[-TAIL:]
        pieces = self._pieces
        pieces.append(Said(self.stream, when, data))
        self._size += len(data)
        while len(pieces) > PIECES or (self._size - len(pieces[0].data)) >= TAIL:
            self._size -= len(pieces.popleft().data)
        if self._size > TAIL:
            first = pieces[0]
            pieces[0] = first._replace(data=first.data[self._size - TAIL :])
            self._size = TAIL


def pack(said: Iterable[Said]) -> bytes:
    """As bytes; `unpack` undoes it."""
    return b"".join(_PIECE.pack(*piece[:2], len(piece.data)) + piece.data for piece in said)


def unpack(data: bytes) -> tuple[Said, ...]:
    """What `pack` made."""
    found = []
    start = 0
    while start < len(data):
        stream, when, size = _PIECE.unpack_from(data, start)
        start += _PIECE.size
        found.append(Said(stream, when, data[start : start + size]))
        start += size
    return tuple(found)


def text_since(said: Iterable[Said], stream: int, start: float) -> str:
    """What was said on `stream` and read since `start`, as text."""
    pieces = [piece.data for piece in said if piece.stream == stream and piece.when >= start]
    return b"".join(pieces).decode("utf-8", "replace")
