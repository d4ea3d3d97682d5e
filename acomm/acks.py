"""Acknowledgements: of a message that was taken, of a request that is stored; and what a refusal needs of
one that cannot be read.
"""

from __future__ import annotations

from acomm import jsontext, urls
from acomm.accepted import Accepted
from acomm.errors import BadRequest
from acomm.members import GENERATION_3_KEYS, MAX_ID, asks_for_more, check_name, read_text


def ok_ack(id_json: bytes, wire: int, extended: bool, accepted: Accepted | None = None) -> bytes:
    """The acknowledgement of a message that was taken; `id_json` is its id as JSON text. Where a request
    stands goes to who asked for extensions, and comes last: the rest is what its sender expects.
    """
    key = b"stream_url" if wire == 2 else b"streamURL"
    if not extended:
        tail = b"}"
    elif accepted is None:
        tail = b',"acomm":1}'
    else:
        tail = b',"acomm":1,"accepted":%b}' % accepted.json()
    return b'{"error":"","id":%b,"result":null,"%b":null%b' % (id_json, key, tail)


STORED_TAIL = b',"stored":true}'
"""The end of an acknowledgement to one of our own kind: the request outlives the supervisor."""


def stored_ack(ack: bytes) -> bytes:
    """`ack`, and that the request is stored."""
    return ack[:-1] + STORED_TAIL


def salvage(data: bytes, *, raw: bool = False) -> tuple[str, int, bool, str | None]:
    """What can be read of a request that did not decode: its id, generation, whether it asked for
    extensions, and its hook; so that the refusal reaches the right place in the right spelling.
    """
    try:
        fields = jsontext.object_fields(data, frozenset(), "request")
    except BadRequest:
        return "", 1 if raw else 2, False, None
    wire = 1 if raw else 2 if GENERATION_3_KEYS.isdisjoint(fields) else 3
    by_name = {name.casefold(): raw for name, raw in fields.items()}
    try:
        id = read_text(by_name.get("id"), "id")
        check_name("id", id, MAX_ID)
    except BadRequest:
        id = ""
    try:
        hook = urls.decode(by_name.get("responsehook"), "response hook")
    except BadRequest:
        hook = None
    extended = asks_for_more(by_name.get("acomm"))
    return id, wire, extended, hook
