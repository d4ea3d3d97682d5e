"""Where an accepted request stands, as its acknowledgement tells those who asked for extensions."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec


class Accepted(NamedTuple):
    """`position` accepted requests that wait for a worker come before this one. `expected_wait` is the
    seconds until it will likely begin; None if nothing is known.
    """

    position: int
    expected_wait: float | None

    def json(self) -> bytes:
        """As the acknowledgement's key `accepted` has it; the wait to the millisecond."""
        if self.expected_wait is None:
            return b'{"position":%d,"expected_wait":null}' % self.position
        return b'{"position":%d,"expected_wait":%.3f}' % (self.position, self.expected_wait)


class _Accepted(msgspec.Struct):
    position: Annotated[int, msgspec.Meta(ge=0)]
    expected_wait: Annotated[float, msgspec.Meta(ge=0)] | None = None


class _Acknowledgement(msgspec.Struct):
    accepted: _Accepted | None = None


_acknowledgement = msgspec.json.Decoder(_Acknowledgement)


def read_accepted(ack: bytes) -> Accepted | None:
    """What an acknowledgement tells of its request; None if it tells nothing that makes sense: it is an
    extra, and the request was accepted all the same.
    """
    try:
        told = _acknowledgement.decode(ack).accepted
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return None if told is None else Accepted(told.position, told.expected_wait)
