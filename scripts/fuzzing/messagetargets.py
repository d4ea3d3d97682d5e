"""Framing and messages: what comes in at any socket."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from acomm import messages
from acomm.acks import ok_ack, salvage
from acomm.errors import AcommError
from acomm.framing import Framer, FrameTooLarge, frame
from acomm.messages import Request, Response
from acomm.outgoing import ack_error

_MAX_FRAME = 4096


def requests() -> list[bytes]:
    plain = Request("echo", [1, "é", {"id": "x"}], id="abc", response_hook="unix:///tmp/x.sock")
    more = Request(
        "add", {"a": 1}, id="ü", response_hook="http://h/x", timeout=2.5, priority=3, detached=True
    )
    return [r.encode(wire, extended=e) for r in (plain, more) for wire in (1, 2, 3) for e in (False, True)]


def responses() -> list[bytes]:
    error = AcommError("x", type="ValueError", traceback="t", receipt={"pid": 1})
    answers = [Response("abc", {"a": 1}), Response("abc"), Response("é", error=error)]
    answers.append(Response("s", stream_url="unix:///tmp/s", stream_format="lines"))
    made = [r.encode(wire, extended=e) for r in answers for wire in (1, 2, 3) for e in (False, True)]
    return [*made, *(ok_ack(b'"abc"', wire, e) for wire in (2, 3) for e in (False, True))]


class Framing:
    """Bytes as they come, cut anywhere: the same messages as in one piece, and no more kept than came."""

    def samples(self) -> list[bytes]:
        framed = [frame(message) for message in requests() + responses()]
        return [*framed, framed[0] + framed[1] + frame(b""), *requests()]

    def feed(self, data: bytes, dice: random.Random) -> None:
        whole = self._read([data])
        cut = dice.randrange(len(data) + 1)
        assert self._read([data[:cut], data[cut:]]) == whole
        at = sorted(dice.randrange(len(data) + 1) for _ in range(4))
        pieces = [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]
        assert self._read(pieces) == whole

    def _read(self, pieces: list[bytes]) -> tuple[list[bytes], str]:
        framer, found, came = Framer(_MAX_FRAME), list[bytes](), 0
        try:
            for piece in pieces:
                found += framer.receive(piece)
                came += len(piece)
                assert framer.pending <= came
            found += framer.receive_eof()
        except FrameTooLarge as error:
            return found + error.messages, "too large"
        except AcommError as error:
            return found, str(error)
        return found, ""


class _Messages:
    decoded: Any

    def feed(self, data: bytes, dice: random.Random) -> None:
        quick = _reading(self.decoded, data)
        own = messages._decode_own_request, messages._decode_own_response
        messages._decode_own_request = lambda data, localhost=None: None
        messages._decode_own_response = lambda data: None
        try:
            general = _reading(self.decoded, data)
        finally:
            messages._decode_own_request, messages._decode_own_response = own
        assert quick == general, (quick, general)
        if not isinstance(quick, dict):
            salvage(data, raw=dice.random() < 0.2)
            ack_error(data)
            return
        message = self.decoded.decode(data)
        for wire in (1, 2, 3):
            if wire < 3 and isinstance(message, Request) and message.response_hook is None:
                continue
            again = self.decoded.decode(message.encode(wire, extended=True))
            assert (again.id, again.extended) == (message.id, True)
        again = _reading(self.decoded, message.encode(3, extended=True))
        same = (
            {**quick, "wire": 3, "extended": True}
            if isinstance(message, Request)
            else {**quick, "extended": True}
        )
        if quick.get("error") is None:
            assert again == same, (again, same)


class Requests(_Messages):
    """Requests of all generations: the quick way is the general one, and what is written is read again."""

    decoded = Request

    def samples(self) -> list[bytes]:
        return requests()


class Responses(_Messages):
    """Responses and acknowledgements, likewise."""

    decoded = Response

    def samples(self) -> list[bytes]:
        return responses()


def _reading(cls: Any, data: bytes) -> Any:
    try:
        message = cls.decode(data)
    except AcommError as error:
        return type(error).__name__
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    fields["error"] = None if fields.get("error") is None else fields["error"].info()
    found = {
        name: bytes(value) if isinstance(value, msgspec.Raw) else value for name, value in fields.items()
    }
    if found.get("args") == b"null":
        found["args"] = None  # the quick way leaves it as it is, and it means the same
    for name in ("response_hook", "task_url", "stream_url"):
        if found.get(name) is not None and not found[name].startswith("unix:"):
            scheme, colon, rest = found[name].partition("#")[0].partition(":")  # a fragment does not travel
            found[name] = scheme.lower() + colon + rest
    return found
