"""Any message: what is written is read, in all three generations; what is read means the same to both ways of
reading it; and what others write is understood or refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from acomm import messages
from acomm.accepted import Accepted, read_accepted
from acomm.acks import ok_ack, salvage, stored_ack
from acomm.errors import WIRE_ERRORS, AcommError, BadRequest
from acomm.messages import MAX_PRIORITY, Handlers, Request, Response
from acomm.outgoing import ack_error

characters = st.characters(exclude_categories=["Cs"])  # U+D800 to U+DFFF are none
text = st.text(characters, max_size=12)
labels = st.text(characters, min_size=1, max_size=12).filter(str.isprintable)
generations = st.sampled_from([1, 2, 3])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
paths = st.text("ab/é漢 %2F:@!$&'()*+,;=[]{}|\\^`\"<>~.-_", max_size=12)
queries = st.sampled_from(["", "?", "??", "?a=1&b=%20", "?é /?", "?;x|y"])
urls = st.builds("unix:///{}".format, st.text("ab/é漢 %2F?#&+:@", max_size=12)) | st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["http", "https"]),
    st.sampled_from(["h", "example.com:8080", "[::1]:1", "127.0.0.1"]),
    paths.map(lambda path: path and "/" + path),
    queries,
)
pickles = st.none() | st.text("abcDEF123+/=", max_size=8)
requests = st.builds(
    Request,
    task=labels,
    args=values,
    id=labels,
    response_hook=urls,
    task_url=st.none() | urls,
    stream_url=st.none() | urls,
    timeout=st.none() | st.floats(0, 1e300, exclude_min=True),
    priority=st.integers(-MAX_PRIORITY, MAX_PRIORITY),
    handlers=st.none() | st.builds(Handlers, pickles, pickles, text, text),
    detached=st.booleans(),
)
errors = st.builds(
    lambda cls, message, **more: cls(message, **more),
    st.sampled_from([AcommError, *WIRE_ERRORS.values()]),
    text,
    type=st.none() | text,
    traceback=st.none() | text,
    receipt=st.none() | st.dictionaries(text, values, max_size=2),
    retry_after=st.none() | st.floats(0, 1e9),
)


def plain(message: Request | Response) -> dict[str, Any]:
    """What a message says, with the JSON in it decoded, and an error as its details."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    for name in ("args", "result"):
        if isinstance(fields.get(name), msgspec.Raw):
            fields[name] = json.loads(bytes(fields[name]))
    if fields.get("error") is not None:
        fields["error"] = fields["error"].code, fields["error"].info()
    return fields


@given(requests, generations, st.booleans())
def test_a_request_comes_back_in_each_generation(request: Request, wire: int, extended: bool) -> None:
    data = request.encode(wire, extended=extended)
    json.loads(data)
    expected = {
        **plain(request),
        "wire": wire,
        "extended": extended,
        "detached": extended and request.detached,
    }
    if wire < 3:
        expected.update(task_url=None, stream_url=None)
    assert plain(Request.decode(data, raw=wire == 1)) == expected


@given(text, values, generations, st.booleans(), st.none() | urls, st.sampled_from([None, "lines", "bytes"]))
def test_a_response_comes_back_in_each_generation(
    id: str, result: Any, wire: int, extended: bool, stream: str | None, kind: str | None
) -> None:
    response = Response(id, result, None, stream, extended, kind)
    data = response.encode(wire, extended=extended)
    json.loads(data)
    expected = {**plain(response), "stream_format": kind if extended else None}
    if wire == 1:
        expected["stream_url"] = None
    assert plain(Response.decode(data)) == expected


@given(text, errors, generations, st.booleans())
def test_an_error_comes_back_with_all_that_is_known_of_it(
    id: str, error: AcommError, wire: int, extended: bool
) -> None:
    again = Response.decode(Response(id, error=error).encode(wire, extended=extended))
    assert again.error is not None, "an error never becomes a success"
    shown = str(error) or error.type or error.code
    assert str(again.error) == shown
    if extended:
        assert (again.error.code, again.error.info()) == (error.code, {**error.info(), "message": shown})


@given(labels, st.sampled_from([2, 3]), st.none() | st.builds(Accepted, st.integers(0, 2**40), st.none()))
def test_an_acknowledgement_says_what_was_meant(id: str, wire: int, accepted: Accepted | None) -> None:
    ack = stored_ack(ok_ack(msgspec.json.encode(id), wire, True, accepted))
    assert ack_error(ack) == (True, None)
    assert read_accepted(ack) == accepted
    assert plain(Response.decode(ack)) == plain(Response(id, extended=True))


# -- as others write them ---------------------------------------------------------------------------

REQUEST_KEYS = "id task taskURL responseHook streamURL args timeout priority handlers detached acomm".split()
RESPONSE_KEYS = "error id result streamURL stream_url error_info stream_format acomm".split()
HOOK = b'{"Scheme":"unix","Path":"/tmp/x.sock"}'
ODD = [
    b"1",
    b"null",
    b'""',
    b'"x"',
    b"[]",
    b"{}",
    b"true",
    b"-1",
    b"1.0",
    b"1e999",
    b'"\\ud800"',
    b"-0",
    b"9" * 30,
]
ODD += [
    HOOK,
    b'"unix:///x"',
    b'{"Scheme":"tcp"}',
    b'"a\\u0000"',
    b'"\xff"',
    b"[" * 2000,
    b"NaN",
    b"",
    b'{"a":1,"a":2}',
]
SPACES = [b"", b"", b"", b" ", b"\n\t"]


def spellings(name: str) -> st.SearchStrategy[str]:
    return st.sampled_from(
        [name, name, name, name, name.lower(), name.upper(), f"\\u{ord(name[0]):04x}{name[1:]}"]
    )


@st.composite
def spelled(draw: st.DrawFn, keys: list[str], good: dict[str, bytes]) -> bytes:
    """A message with some of `keys`: in order or not, once or twice, with values `good` or odd, spaces, and
    keys of others.
    """
    chosen = [key for key in keys if key in good and draw(st.integers(0, 9))]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        chosen.insert(draw(st.integers(0, len(chosen))), draw(st.sampled_from([*keys, "x", "ID", ""])))
    if draw(st.integers(0, 3)) == 0:
        chosen = draw(st.permutations(chosen))
    space = draw(st.sampled_from(SPACES))
    members = []
    for key in chosen:
        odd = draw(st.integers(0, 5)) == 0 or key not in good
        value = draw(st.sampled_from(ODD) | values.map(msgspec.json.encode)) if odd else good[key]
        members.append(
            b'"%b"%b:%b%b' % (draw(spellings(key) if key else st.just("")).encode(), space, space, value)
        )
    return space + b"{" + (b"," + space).join(members) + b"}" + space


REQUEST = {"id": b'"i"', "task": b'"t"', "taskURL": b"null", "responseHook": HOOK, "streamURL": b"null"}
REQUEST |= {"args": b"[1,2]", "acomm": b"1"}
RESPONSE = {"error": b'""', "id": b'"i"', "result": b'{"a":1}', "streamURL": b"null", "acomm": b"1"}
FULL = {**REQUEST, "timeout": b"2.5", "priority": b"3", "handlers": b'{"success":"x"}', "detached": b"true"}
FAILED = {
    **RESPONSE,
    "error": b'"e"',
    "error_info": b'{"code":"busy","retry_after":1}',
    "stream_format": b'"lines"',
}
some_requests = spelled(REQUEST_KEYS, REQUEST) | spelled(REQUEST_KEYS, FULL)
some_responses = spelled(RESPONSE_KEYS, RESPONSE) | spelled(RESPONSE_KEYS, FAILED)


def read(decode: Callable[[bytes], Request | Response], data: bytes) -> Any:
    try:
        return plain(decode(data))
    except BadRequest as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return BadRequest


def generally(decode: Callable[[bytes], Request | Response], data: bytes) -> Any:
    """As `read`, by the way that understands all spellings."""
    none = mock.Mock(return_value=None)
    with mock.patch.multiple(messages, _decode_own_request=none, _decode_own_response=none):
        return read(decode, data)


@given(some_requests, st.booleans())
def test_a_request_in_any_spelling_is_read_or_refused(data: bytes, raw: bool) -> None:
    found = read(Request.decode, data)
    assert found == generally(Request.decode, data)
    as_generation_1 = read(lambda data: Request.decode(data, raw=True), data)
    if found is BadRequest:
        id, wire, _, hook = salvage(data, raw=raw)
        assert id.isprintable() and wire in (1, 2, 3) and (hook is None or hook.startswith("unix://"))
        return
    assert isinstance(json.loads(data), dict)
    request = Request.decode(data)
    request.validate()
    assert read(Request.decode, request.encode(3, extended=True)) == {**found, "wire": 3, "extended": True}
    if as_generation_1 is not BadRequest:
        urls_of_generation_3 = {"task_url": None, "stream_url": None}
        assert as_generation_1 == {**found, "wire": 1, **urls_of_generation_3}


@given(some_responses)
def test_a_response_in_any_spelling_is_read_or_refused(data: bytes) -> None:
    found = read(Response.decode, data)
    assert found == generally(Response.decode, data)
    read_accepted(data)
    granted, error = ack_error(data)
    if found is BadRequest:
        assert error is not None and not granted, "what cannot be read acknowledges nothing"
    else:
        assert isinstance(json.loads(data), dict)
        assert (granted, error is None) == (found["extended"], found["error"] is None)


def test_the_quick_way_is_taken() -> None:
    """Else the two tests above compare one way with itself."""
    data = b"{" + b",".join(b'"%b":%b' % (key.encode(), value) for key, value in REQUEST.items()) + b"}"
    assert messages._decode_own_request(data) is not None
    data = b"{" + b",".join(b'"%b":%b' % (key.encode(), value) for key, value in RESPONSE.items()) + b"}"
    assert messages._decode_own_response(data) is not None
