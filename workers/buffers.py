"""Values as pickles whose large parts lie in shared memory; `workers.segments` has that.

    value --pickle--> stream, and buffers over LARGE bytes beside it (PEP 574) --> one segment
    segment --map--> buffers, in place; the stream is unpickled from there

Buffers that pickle hands out (NumPy's arrays, pandas' frames, Arrow's tables, memoryviews) are used where
they lie. Bytes, bytearrays and strings are part of the stream: they are copied out of the segment as they
are made anew, but not into the stream before. Whatever makes a long stream goes the same way.

A memoryview, which pickle refuses, arrives as one of the same format and shape.
"""

from __future__ import annotations

import copyreg
import pickle
from typing import Any

import msgspec

from workers.segments import Arena, Buffer, Place, Reader, Segment

LARGE = 98304
"""Bytes from which on shared memory is the faster way."""

_PIECE = 65536
"""Bytes of a value from which on a pickler writes it as a piece of its own."""

_FRAMES = (b"\x95", b"\x80\x05\x95")
"""How a pickler's own pieces begin, but for some of a few bytes: a FRAME opcode. Others are values."""

_FORMATS = frozenset("cbB?hHiIlLqQnNfdP")  # that a memoryview can be cast to

_places = msgspec.msgpack.Decoder(Place)
_encode = msgspec.msgpack.Encoder().encode


class Stored:
    """A value in a segment: `data` is what travels, an encoded Place and what the sender adds."""

    __slots__ = ("data", "segment")

    def __init__(self, segment: Segment, data: bytes) -> None:
        self.segment = segment
        self.data = data


class LargeBuffer(Exception):
    """Raised by `small`; pickling has met a buffer that is not to be copied."""


def small(buffer: pickle.PickleBuffer) -> bool:
    """The `buffer_callback` of a pickling that is expected to be small. Raises LargeBuffer if it is not."""
    if memoryview(buffer).nbytes >= LARGE:
        raise LargeBuffer
    return True


class _Pieces(list[Buffer]):
    """A file for a pickler that keeps what is written, values of some length uncopied."""

    write = list.append


def _reduce(view: memoryview[Any]) -> Any:
    if view.format.lstrip("@") not in _FORMATS:
        raise pickle.PicklingError(f"a memoryview of the format {view.format!r} cannot be pickled")
    if view.c_contiguous and view.nbytes:
        flat = view.cast("B")
    else:
        flat = memoryview(view.tobytes() if view.readonly else bytearray(view.tobytes()))
    return _view, (pickle.PickleBuffer(flat), view.format, view.shape if view.nbytes else None)


REDUCERS: dict[Any, Any] = {memoryview: _reduce}
"""What picklers of another kind must have in their `dispatch_table`."""


def _view(buffer: Buffer, format: str, shape: tuple[int, ...] | None) -> memoryview[Any]:
    flat = memoryview(buffer).cast("B")
    # The stubs know of literal formats only.
    return flat.cast(format) if shape is None else flat.cast(format, shape)  # type: ignore[call-overload, no-any-return]


class Pickled:
    """A value as a stream in pieces, and the buffers that are not part of it."""

    __slots__ = ("buffers", "pieces")

    def __init__(self, pieces: list[Buffer], buffers: list[memoryview[int]]) -> None:
        self.pieces = pieces
        self.buffers = buffers

    @property
    def is_large(self) -> bool:
        return sum(map(len, self.buffers)) + sum(map(len, self.pieces)) >= LARGE

    @property
    def names_main(self) -> bool:
        """Whether it may refer to something of `__main__`."""
        return any(b"__main__" in piece for piece in self.pieces if len(piece) < _PIECE or _is_frame(piece))

    def joined(self) -> bytes:
        """The stream, which must be all."""
        assert not self.buffers
        return b"".join(self.pieces)

    def store(self, arena: Arena) -> Stored | None:
        """Put it in a segment; None if there is no room."""
        found = arena.store([*([buffer] for buffer in self.buffers), self.pieces])
        return None if found is None else Stored(found[0], _encode(found[1]))


def _is_frame(piece: Buffer) -> bool:
    return bytes(piece[:3]).startswith(_FRAMES)


def dump(value: Any, pickler: type[pickle.Pickler] = pickle.Pickler, *, beside: bool = True) -> Pickled:
    """Pickle, with large buffers beside the stream, unless told not to. Raises what pickling raises."""
    pieces = _Pieces()
    buffers: list[memoryview[int]] = []

    def within(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # pickle says what is wrong
            return True
        if raw.nbytes < _PIECE:
            return True
        buffers.append(raw)
        return False

    writer = pickler(pieces, 5, buffer_callback=within if beside else None)
    # Not by `copyreg` itself, which is the program's. A chain of maps would cost time for each object.
    if pickler is pickle.Pickler:
        writer.dispatch_table = {**copyreg.dispatch_table, **REDUCERS}
    writer.dump(value)
    return Pickled(pieces, buffers)


def place_of(data: Buffer) -> Place:
    """Decode a Place. Raises msgspec.MsgspecError."""
    return _places.decode(data)


def load(reader: Reader, place: Place) -> Any:
    """The value. Its memory is given back when it has let go of all that lies there. Raises what unpickling
    raises, and OSError.
    """
    *buffers, stream = reader.open(place)
    return pickle.loads(stream, buffers=buffers)
