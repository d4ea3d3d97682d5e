"""Bytes in, whole messages out; no socket, no clock, no JSON.

A unix connection carries one of two framings, told apart by its first byte:

* **length frames** (generations 2 and 3 of the Go original): a 4-byte big-endian length, then that
  many bytes of JSON. Any number of frames may follow each other.
* **EOF-ended JSON** (generation 1): raw JSON from the first byte to the end of the stream, so the
  first byte is `{`, `[`, `"` or white space. One message a connection, and nothing can be sent back.

As a length, the smallest of generation 1's first bytes (a tab, 0x09) would announce 144 MiB. The
frame limit stays below that, so the first byte can never be misread.
"""

from __future__ import annotations

import struct

from acomm.errors import BadRequest, TooLarge

DEFAULT_MAX_FRAME = 64 * 1024 * 1024
LARGEST_MAX_FRAME = 0x09000000 - 1
"""Bytes. Above it a length header could begin with a byte that also begins JSON."""

HEADER = struct.Struct(">I")
_JSON_START = frozenset(b'{[ \t\r\n"')


def frame(payload: bytes) -> bytes:
    """`payload` with its length header, to be sent in one write: Go peers read the header with a
    single `Read` and take a split one for garbage.
    """
    return HEADER.pack(len(payload)) + payload


class Framer:
    """Splits what one connection receives into messages.

    Feed it with `receive(data)` as data comes and `receive_eof()` when the peer has finished
    sending; both return the messages that are complete, in order. `raw` is None until the first
    byte has been seen, then True for EOF-ended JSON and False for length frames.

    Raises TooLarge as soon as a header announces more than `max_frame` bytes (nothing of the body
    is kept), or EOF-ended JSON grows beyond it. Messages that were complete before that point are
    on the exception as `messages`. After an error the stream cannot be followed any more; what comes
    then is dropped.
    """

    def __init__(self, max_frame: int = DEFAULT_MAX_FRAME) -> None:
        if not 0 < max_frame <= LARGEST_MAX_FRAME:
            raise ValueError(f"max_frame must be from 1 to {LARGEST_MAX_FRAME} bytes, not {max_frame}")
        self.max_frame = max_frame
        self.raw: bool | None = None
        self._buffer = bytearray()
        self._failed = False
        self._wanted = 0  # bytes that the buffer needs before a length frame is whole; 0: unknown

    @property
    def partial(self) -> bool:
        """Whether a message has begun and is not whole yet."""
        return bool(self._buffer)

    @property
    def pending(self) -> int:
        """Bytes of the unfinished message held now."""
        return len(self._buffer)

    @property
    def needs(self) -> int:
        """Bytes that the unfinished message will take, as far as is known."""
        return max(self._wanted, len(self._buffer)) if self._buffer else 0

    def receive(self, data: bytes) -> list[bytes]:
        """Take received bytes; return the messages that are whole now."""
        if not data or self._failed:
            return []
        if self.raw is None:
            self.raw = data[0] in _JSON_START
        if self.raw:
            return self._receive_raw(data)
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        return self._split(data)

    def _receive_raw(self, data: bytes) -> list[bytes]:
        self._buffer += data
        if len(self._buffer) > self.max_frame:
            raise self._too_large(None, [])
        return []

    def _split(self, data: bytes) -> list[bytes]:
        messages: list[bytes] = []
        position, end = 0, len(data)
        self._wanted = 0
        while end - position >= 4:
            (length,) = HEADER.unpack_from(data, position)
            if length > self.max_frame:
                raise self._too_large(length, messages)
            if end - position - 4 < length:
                self._wanted = length + 4
                break
            messages.append(data[position + 4 : position + 4 + length])
            position += 4 + length
        if position < end:
            self._buffer += data[position:]
        return messages

    def receive_eof(self) -> list[bytes]:
        """The peer sends no more. Raises BadRequest when that cut a message short."""
        if self._failed:
            return []
        held = bytes(self._buffer)
        self._buffer.clear()
        if self.raw:
            return [held]
        if held:
            wanted = f"{self._wanted - 4} bytes" if self._wanted else "a length header of 4 bytes"
            got = len(held) - 4 if self._wanted else len(held)
            raise BadRequest(f"the stream ended inside a message: {got} of {wanted} arrived")
        return []

    def _too_large(self, length: int | None, messages: list[bytes]) -> FrameTooLarge:
        self._failed = True
        self._buffer.clear()
        what = "message" if length is None else f"frame of {length} bytes"
        error = FrameTooLarge(f"{what} is larger than the limit of {self.max_frame} bytes")
        error.messages = messages
        return error


class FrameTooLarge(TooLarge):
    """A message beyond the frame limit; `messages` came whole before it."""

    messages: list[bytes]
