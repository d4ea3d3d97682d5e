"""The quick way through a message of our own spelling says just what the general way says."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from acomm import messages
from acomm.errors import AcommError
from acomm.messages import Request, Response

MESSAGES: list[tuple[type[Request] | type[Response], bytes]] = [
    (
        Request,
        Request(
            "echo",
            [1, "é", {"id": "x"}],
            id="abc",
            response_hook="unix:///tmp/x.sock",
            timeout=timeout,
            priority=priority,
        ).encode(extended=True),
    )
    for timeout in (None, 2.5)
    for priority in (0, 3)
] + [
    (Request, Request("echo", id="ü").encode(extended=True)),
    (Response, Response("abc", {"a": 1}).encode(extended=True)),
    (Response, Response("abc").encode(extended=True)),
]
PIECES = (
    b'"id":"zz",|,"acomm":1| |\\u0069|\xff|null|"error":"x",|1e999|{|}|,|"|\\ud800|1.0|true|,"timeout":-1|'
    b',"priority":99999999999|"args":1,|"ID":"q",|\xc3\xa9'
).split(b"|")


def mutated(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(0, 2)):
        place, way = dice.randrange(len(changed) + 1), dice.random()
        if way < 0.5:
            changed[place:place] = dice.choice(PIECES)
        elif way < 0.8:
            changed[place : place + dice.randint(1, 8)] = b""
        else:
            changed[place : place + 4] = dice.choice(PIECES)
    return bytes(changed)


def reading(cls: type[Request] | type[Response], data: bytes) -> Any:
    try:
        message = cls.decode(data)
    except AcommError as error:
        return type(error)
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return {name: bytes(v) if isinstance(v, msgspec.Raw) else v for name, v in fields.items()}


def test_both_ways_agree_on_any_message(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(1)
    samples = [(cls, mutated(data, dice)) for cls, data in MESSAGES for _ in range(4000)]
    quick = [reading(cls, data) for cls, data in samples]
    taken = sum(
        quickly is not None and messages._decode_own_response(data) is not None
        for (cls, data), quickly in zip(samples, quick, strict=True)
        if cls is Response
    )
    assert taken > 1000, "the quick way is hardly taken"
    monkeypatch.setattr(messages, "_decode_own_request", lambda data, localhost=None: None)
    monkeypatch.setattr(messages, "_decode_own_response", lambda data: None)
    general = [reading(cls, data) for cls, data in samples]
    for sample, one, other in zip(samples, quick, general, strict=True):
        assert one == other, sample


def test_what_our_own_programs_send_takes_the_quick_way() -> None:
    for cls, data in MESSAGES:
        if b"\xc3" not in data[:12]:
            decode = messages._decode_own_request if cls is Request else messages._decode_own_response
            assert decode(data) is not None, data


def test_new_ids_are_random_uuids() -> None:
    import uuid

    made = {messages.new_id() for _ in range(1000)}
    assert len(made) == 1000
    for text in made:
        parsed = uuid.UUID(text)
        assert (str(parsed), parsed.version, parsed.variant) == (text, 4, uuid.RFC_4122)
