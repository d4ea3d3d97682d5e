"""Random changes of samples. It knows no format, but bytes on which such parsers have stumbled."""

from __future__ import annotations

import random

PIECES = (
    b'"id":"z",|"acomm":1|\\u0069|\\ud800|\xff|\xc3\xa9|null|true|1e999|-0|NaN|{|}|[|]|,|"|:|\\|99999999999999999999|'
    b"\x00\x00\x00\x00|\x00\x00\x00\x01|\xff\xff\xff\xff|\x09|\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00|"
    b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00|\xcb\xff\xf0\x00\x00\x00\x00\x00\x00|\xcf\xff\xff\xff\xff\xff\xff\xff\xff|"
    b"\xc0|\xdd\xff\xff\xff\xff|\x91\x91\x91\x91\x91\x91|\r\n\r\n|\r\nContent-Length: 1|"
    b"\x7f\xf8\x00\x00\x00\x00\x00\x00"
).split(b"|")


def mutated(sample: bytes, samples: list[bytes], dice: random.Random) -> bytes:
    """`sample` with some changes; one in eight is left as it is, and one in thirty is noise."""
    way = dice.random()
    if way < 0.125:
        return sample
    if way > 0.967:
        return dice.randbytes(dice.randrange(64))
    data = bytearray(sample)
    for _ in range(dice.randint(1, 4)):
        place, way = dice.randrange(len(data) + 1), dice.random()
        if way < 0.3:
            data[place:place] = dice.choice(PIECES)
        elif way < 0.5:
            piece = dice.choice(PIECES)
            data[place : place + len(piece)] = piece
        elif way < 0.7:
            data[place : place + dice.randint(1, 16)] = b""
        elif way < 0.9 and data:
            data[place % len(data)] ^= 1 << dice.randrange(8)
        else:
            other = dice.choice(samples)
            data[place:] = other[dice.randrange(len(other) + 1) :]
    return bytes(data)
