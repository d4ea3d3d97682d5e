"""Both doors, whatever bytes come, made of the parts that heads, bodies and frames are made of.

What must hold of every answer, and of what a connection leaves behind, the targets of `scripts/fuzz` say.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from fuzzing.doortargets import Http, Unix
from fuzzing.hooktargets import Hooks

OFTEN = settings(max_examples=300)


@pytest.fixture(scope="module")
def http() -> Iterator[Http]:
    door = Http()
    yield door
    door.close()


@pytest.fixture(scope="module")
def unix() -> Iterator[Unix]:
    door = Unix()
    yield door
    door.close()


@pytest.fixture(scope="module")
def hooks() -> Iterator[Hooks]:
    target = Hooks()
    yield target
    target.close()


def some(*parts: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from(parts)


BODY = b'{"id":"a","task":"echo","taskURL":null,"responseHook":{"Scheme":"unix","Path":"/x"},"args":[1]}'
noise = st.binary(max_size=20)
bodies = (
    some(b"", b"[1]", b"{}", b"null", BODY, BODY[:-1], b"[" * 5000, b'{"value":' + b"9" * 5000 + b"}") | noise
)
methods = some(b"GET", b"POST", b"POST", b"POST", b"HEAD", b"OPTIONS", b"CONNECT", b"get", b"PRI", b"")
targets = some(
    *(b"/", b"/call/echo", b"/call/", b"/call/%00", b"/call/a%2Fb", b"/call/echo?timeout=nan", b"/stream?"),
    *(b"/call/echo?timeout=1e400", b"/call/echo?priority=1&priority=2", b"/stream?addr=unix:///etc/passwd"),
    *(
        b"/call/echo?timeout=5&x",
        b"/proxy?key=",
        b"/proxy?key=%ff",
        b"/healthz",
        b"/readyz#x",
        b"/openapi.json",
    ),
    *(b"http://localhost/", b"//x", b"*", b"/..//", b"/\xff", b"/?" + b"a" * 9000, b"/call/" + b"t" * 300),
)
fields = st.tuples(
    some(b"Host", b"Host", b"Content-Type", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Expect")
    | some(
        b"Origin", b"Authorization", b"Content-Encoding", b"Upgrade", b"Accept", b"X-A", b"Cookie", b" ", b""
    ),
    some(
        b"localhost", b"localhost", b"evil", b"127.0.0.1:8", b"[::1", b"application/json", b"application/json"
    )
    | some(b"APPLICATION/JSON ; x", b"0", b"3", b"-1", b"+3", b"3, 3", b"0x3", b"9" * 30, b"chunked", b"gzip")
    | some(
        b"chunked, chunked",
        b"close",
        b"keep-alive",
        b"100-continue",
        b"null",
        b"http://localhost",
        b"\xff\xfe",
    )
    | some(
        b"Bearer x", b"Bearer " + b"\xc3\xa9" * 3000, b"websocket", b"a\tb", b"a\x00b", b"identity", b"" * 9
    ),
)


@st.composite
def exchanges(draw: st.DrawFn) -> bytes:
    """A request, or several of them, whose head says of its body what may be true or not."""
    found = b""
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        body = draw(bodies)
        head = [
            b"%b %b HTTP/%b"
            % (draw(methods), draw(targets), draw(some(b"1.1", b"1.1", b"1.0", b"2.0", b"9")))
        ]
        if draw(st.integers(0, 3)):
            head += [b"Host: localhost", b"Content-Type: application/json"]
        framing = draw(st.sampled_from(["length", "length", "chunks", "none"]))
        if framing == "length":
            head.append(b"Content-Length: %d" % len(body))
        elif framing == "chunks":
            head.append(b"Transfer-Encoding: chunked")
            body = b"%x\r\n%b\r\n%b" % (
                len(body),
                body,
                draw(some(b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"-1\r\n", b"")),
            )
        head += [b"%b:%b" % field for field in draw(st.lists(fields, max_size=3))]
        found += draw(some(b"\r\n", b"\r\n", b"\r\n", b"\n")).join([*head, b"", b""]) + body
    return found


@OFTEN
@given(exchanges(), st.integers(0, 2**32))
def test_the_http_door_answers_any_head_and_body_or_closes(http: Http, data: bytes, seed: int) -> None:
    http.feed(data, random.Random(seed))


messages = some(
    BODY, BODY[:-1] + b',"acomm":1}', b"", b"null", b"{}", b"[" * 3000, BODY.replace(b"echo", b"nope")
)
frames = (messages | noise).map(lambda body: len(body).to_bytes(4) + body)
streams = st.lists(
    frames | messages | noise | some(b"\xff\xff\xff\xff", b"\x00\x01\x00\x01"), max_size=5
).map(b"".join)


@OFTEN
@given(streams, st.integers(0, 2**32))
def test_the_unix_door_acknowledges_each_message_in_order(unix: Unix, data: bytes, seed: int) -> None:
    unix.feed(data, random.Random(seed))


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """What an HTTP hook may answer."""
    body = draw(some(b'{"error":"","id":""}', b'{"error":"no"}', b"null", b"{}", b"") | noise)
    head = [
        b"HTTP/1.1 %b"
        % draw(some(b"200 OK", b"204 No", b"301 X", b"500", b"100 C", b"999 \xff", b"-1", b"2e2 X"))
    ]
    head += [b"%b: %b" % field for field in draw(st.lists(fields, max_size=3))]
    if draw(st.booleans()):
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*head, b"", b""]) + body


@OFTEN
@given(answers(), st.integers(0, 2**32))
def test_any_answer_of_a_hook_is_an_acknowledgement_or_none(hooks: Hooks, data: bytes, seed: int) -> None:
    hooks.feed(data, random.Random(seed))
