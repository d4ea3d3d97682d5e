"""Requests and responses: the bytes of all generations, and what of strangers' bytes is accepted."""

import json
import math
import struct
import sys
import uuid
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from acomm import messages
from acomm.acks import ok_ack, salvage
from acomm.errors import AcommError, BadRequest, Busy, TaskError, WorkerLost
from acomm.messages import Handlers, Request, Response, encode_payload

HOOK = "unix:///run/t.sock"
URL = (
    b'{"Scheme":"unix","Opaque":"","User":null,"Host":"","Path":"/run/t.sock","RawPath":"",'
    b'"OmitHost":false,"ForceQuery":false,"RawQuery":"","Fragment":"","RawFragment":""}'
)
ARGS = b'{"b":1,"a":"\\u003cx\\u003e\\u0026\\u2028\xc3\xa9","z":1e3,"s":[1,2]}'


def go_request(wire: int, **other: Any) -> bytes:
    """A valid request as a Go peer of that generation spells it, with members replaced or (...) left out."""
    hook = "responsehook" if wire < 3 else "responseHook"
    members: dict[str, Any] = {"id": "i", "task": "echo", hook: json.loads(URL), "args": None}
    members |= {"taskURL": None, "streamURL": None} if wire == 3 else {}
    members |= {hook if key == "hook" else key: value for key, value in other.items()}
    return json.dumps({k: v for k, v in members.items() if v is not ...}, ensure_ascii=False).encode()


# -- requests, as emitted ---------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [1, 2])
def test_a_request_of_generations_1_and_2_byte_for_byte(wire: int) -> None:
    request = Request("echo", msgspec.Raw(ARGS), id="ID-1", response_hook=HOOK)
    assert request.encode(wire) == (
        b'{"id":"ID-1","task":"echo","responsehook":' + URL + b',"args":' + ARGS + b"}"
    )


def test_a_request_of_generation_3_byte_for_byte() -> None:
    request = Request("echo", msgspec.Raw(ARGS), id="ID-1", response_hook=HOOK)
    assert request.encode() == (
        b'{"id":"ID-1","task":"echo","taskURL":null,"responseHook":'
        + URL
        + b',"streamURL":null,"args":'
        + ARGS
        + b"}"
    )
    request = Request("echo", id="ID-1", task_url=HOOK, stream_url=HOOK)
    assert request.encode() == (
        b'{"id":"ID-1","task":"echo","taskURL":'
        + URL
        + b',"responseHook":null,"streamURL":'
        + URL
        + b',"args":null}'
    )


@pytest.mark.parametrize("wire", [1, 2, 3])
def test_arguments_are_never_left_out(wire: int) -> None:
    assert Request("t", id="i", response_hook=HOOK).encode(wire).endswith(b',"args":null}')


def test_extension_keys_are_written_where_they_are_set() -> None:
    handlers = Handlers("c3Vj", None, "3.11", "0.4.1")
    request = Request("t", 1, id="i", timeout=1.5, priority=-2, handlers=handlers)
    assert request.encode(extended=True).endswith(
        b'"args":1,"timeout":1.5,"priority":-2,'
        b'"handlers":{"success":"c3Vj","python":"3.11","dill":"0.4.1"},"acomm":1}'
    )
    assert Request("t", 1, id="i").encode(extended=True).endswith(b'"args":1,"acomm":1}')


@pytest.mark.parametrize("wire", [0, 4, None])
def test_an_unknown_generation_is_a_mistake_of_ours(wire: Any) -> None:
    with pytest.raises(ValueError, match="wire must be 1, 2 or 3"):
        Request("t").encode(wire)
    with pytest.raises(ValueError, match="wire must be 1, 2 or 3"):
        Response("i").encode(wire)


def test_arguments_that_json_cannot_express_name_their_place() -> None:
    with pytest.raises(TypeError, match=r"args\.x\[1\] is nan"):
        Request("t", {"x": [0.0, math.nan]}).encode()


# -- requests, as accepted: the rows of WIRE.md section 3 -------------------------------------------


@pytest.mark.parametrize("wire", [1, 2, 3])
def test_a_go_request_is_read(wire: int) -> None:
    request = Request.decode(Request("echo", [1], id="i", response_hook=HOOK).encode(wire), raw=wire == 1)
    assert (request.id, request.task, request.response_hook) == ("i", "echo", HOOK)
    assert (request.wire, request.extended) == (wire, False)
    assert request.args_as(list[int]) == [1]


@pytest.mark.parametrize(
    "members",
    [
        {"id": ..., "ID": "i"},
        {"task": ..., "TASK": "echo"},
        {"hook": ..., "RESPONSEHOOK": json.loads(URL)},
        {"hook": ..., "responsehook": json.loads(URL)},
        {"hook": ..., "responseHook": json.loads(URL)},
        {"hook": {"scheme": "unix", "path": "/run/t.sock"}},
        {"keepalive": True, "protocol": {"x": [1]}, "x": None},
        {"hook": HOOK},
        {"hook": {"Scheme": "unix", "Path": "/run/t.sock"}},
        {
            "hook": {
                "Scheme": "unix",
                "Path": "/run/t.sock",
                "New": 1,
                "Host": "h",
                "OmitHost": True,
                "User": {},
            }
        },
        {"hook": {"Scheme": "unix", "Opaque": "/run/t.sock"}},
    ],
)
@pytest.mark.parametrize("wire", [1, 2, 3])
def test_rows_that_every_generation_accepts(wire: int, members: dict[str, Any]) -> None:
    request = Request.decode(go_request(wire, **members), raw=wire == 1)
    assert (request.id, request.task, request.response_hook) == ("i", "echo", HOOK)


@pytest.mark.parametrize(("args", "value"), [(..., None), (None, None), ("text", "text"), ([1, {}], [1, {}])])
@pytest.mark.parametrize("wire", [1, 2, 3])
def test_arguments_of_any_kind_are_accepted(wire: int, args: Any, value: Any) -> None:
    assert Request.decode(go_request(wire, args=args), raw=wire == 1).args_as(Any) == value


def test_a_hooks_query_is_part_of_the_path() -> None:
    hook = {"Scheme": "unix", "Path": "/p.sock", "RawQuery": "a=1"}
    assert Request.decode(go_request(2, hook=hook)).response_hook == "unix:///p.sock?a=1"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"hook": {"Scheme": "unix", "Path": "/p", "User": "x"}}, "User must be dict"),
        (
            {"hook": {"Scheme": "tcp", "Host": "h:1"}},
            "unknown scheme",
        ),  # Go accepts it and loses the response
        ({"id": ...}, "missing id"),
        ({"id": ""}, "missing id"),
        ({"id": None}, "missing id"),
        ({"task": ""}, "missing task"),
        ({"task": ...}, "missing task"),
        ({"id": 5}, "^id: "),
        ({"task": ["x"]}, "^task: "),
        ({"id": "a\0b"}, "id holds control characters"),
        ({"task": "a\nb"}, "task holds control characters"),
        ({"id": "x" * 1025}, "id is longer than 1024"),
        ({"task": "x" * 256}, "task is longer than 255"),
        ({"timeout": 0}, "timeout must be a positive"),
        ({"timeout": -1}, "timeout must be a positive"),
        ({"timeout": "1"}, "^timeout: "),
        ({"priority": 2**63}, "^priority"),
        ({"priority": 2**31}, "^priority must be within"),
        ({"priority": -(2**31)}, "^priority must be within"),
        ({"priority": 1.5}, "^priority: "),
        ({"handlers": "x"}, "^handlers: "),
        ({"handlers": {"success": 1}}, "^handlers: "),
    ],
)
@pytest.mark.parametrize("wire", [1, 2, 3])
def test_rows_that_are_refused(wire: int, members: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        Request.decode(go_request(wire, **members), raw=wire == 1)


@pytest.mark.parametrize("hook", [None, ...])
def test_only_generation_3_may_leave_the_hook_out(hook: Any) -> None:
    assert Request.decode(go_request(3, hook=hook)).response_hook is None
    assert Request.decode(go_request(3, hook=...)).response_hook is None
    for wire in (1, 2):
        with pytest.raises(BadRequest, match="missing response hook"):
            Request.decode(go_request(wire, hook=hook), raw=wire == 1)


def test_a_key_of_no_generation_is_no_hook() -> None:
    with pytest.raises(BadRequest, match="missing response hook"):
        Request.decode(go_request(2, hook=..., response_hook=json.loads(URL)))
    assert Request.decode(go_request(3, hook=..., response_hook=json.loads(URL))).response_hook is None


@pytest.mark.parametrize("space", [b" ", b"\n", b"\r\n\t"])
def test_white_space_round_the_message_is_harmless(space: bytes) -> None:
    assert Request.decode(space + go_request(3) + space).id == "i"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"true",
        b"hello",
        go_request(3) + b"x",
        go_request(3) + go_request(3),
        b"\xef\xbb\xbf" + go_request(3),
        go_request(3).replace(b'"args": null', b'"args": NaN'),
        go_request(3).replace(b'"args": null', b'"args": 1e999'),
        go_request(3).replace(b'"args": null', b'"args": "\\ud800"'),
        go_request(3).replace(b'"args": null', b'"args": "\xff"'),
        go_request(3).replace(b'"args": null', b'"args": ' + b"[" * 20_000 + b"]" * 20_000),
        go_request(3).replace(b'"id": "i"', b'"id": "\\ud800"'),
        go_request(3).replace(b'"id": "i"', b'"id": "i", "id": "j"'),
        go_request(3).replace(b'"id": "i"', b'"id":"i","ID":"j"'),
        b'{"id":"i","ID":"j","task":"t","responseHook":null}',
        b'{"id":"i","task":"t","responseHook":null,"responsehook":' + URL + b"}",
        go_request(3)[:-1],
    ],
)
def test_what_cannot_be_understood_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        Request.decode(data)


def test_repeats_inside_the_arguments_are_the_callers() -> None:
    request = Request.decode(b'{"id":"i","task":"t","args":{"id":1,"id":2},"taskURL":null}')
    assert request.args_as(dict[str, int]) == {"id": 2}


def test_the_arguments_bytes_travel_on_untouched() -> None:
    args = b'{"b": 1.0, "big":9007199254740993, "b":1e+21}'
    request = Request.decode(b'{"id":"i","task":"t","taskURL":null,"args":' + args + b"}")
    assert bytes(request.args) == args
    assert args in request.encode(3)


def test_generations_are_told_apart_by_their_keys() -> None:
    assert Request.decode(go_request(2)).wire == 2
    assert Request.decode(go_request(2, responseHook=None, hook=..., taskURL=None)).wire == 3
    assert Request.decode(go_request(3, streamURL=..., taskURL=...)).wire == 3
    assert Request.decode(go_request(3), raw=True).wire == 1


@pytest.mark.parametrize(
    ("asked", "extended"), [(1, True), (2, False), (True, False), ("1", False), (None, False)]
)
def test_extensions_are_asked_for_with_a_one(asked: Any, extended: bool) -> None:
    assert Request.decode(go_request(3, acomm=asked)).extended is extended


def test_a_request_with_handlers_needs_no_hook() -> None:
    request = Request.decode(go_request(2, hook=..., handlers={"success": "eA==", "new": 1}))
    assert request.handlers == Handlers("eA==")


def test_validate_says_what_the_receiver_would() -> None:
    Request("t", response_hook=HOOK, timeout=1.0, priority=5).validate()
    Request("t").validate()
    for request in (
        Request(""),
        Request("t", id=""),
        Request("t", id="\0"),
        Request("t", timeout=math.inf),
        Request("t", timeout=math.nan),
        Request("t", priority=2**40),
        Request("t", response_hook="tcp://h"),
        Request("t", task_url="unix://relative"),
        Request("t", stream_url="http:///"),
        Request("t", wire=2),
    ):
        with pytest.raises(BadRequest):
            request.validate()


def test_ids_are_random_uuids() -> None:
    ids = {Request("t").id for _ in range(100)}
    assert len(ids) == 100
    assert {uuid.UUID(id).version for id in ids} == {4}


def test_args_as_raises_what_does_not_fit() -> None:
    assert Request("t", {"a": 1}).args_as(dict[str, int]) == {"a": 1}
    with pytest.raises(BadRequest, match=r"^args: "):
        Request("t", msgspec.Raw(b'["x"]')).args_as(list[int])


# -- responses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "tail"), [(1, b"}"), (2, b',"stream_url":null}'), (3, b',"streamURL":null}')]
)
def test_responses_byte_for_byte(wire: int, tail: bytes) -> None:
    result = b'{"a":1,"big":9007199254740993,"e":1e+21,"k":"\\u003cv\\u003e"}'
    assert (
        Response("ID-1", msgspec.Raw(result)).encode(wire)
        == b'{"error":"","id":"ID-1","result":' + result + tail
    )
    assert (
        Response("ID-1", error=TaskError("task failed")).encode(wire)
        == b'{"error":"task failed","id":"ID-1","result":null' + tail
    )


def test_a_stream_goes_under_the_generations_own_key() -> None:
    response = Response("ID-1", stream_url=HOOK)
    assert response.encode(2) == b'{"error":"","id":"ID-1","result":null,"stream_url":' + URL + b"}"
    assert response.encode(3) == b'{"error":"","id":"ID-1","result":null,"streamURL":' + URL + b"}"
    assert b"stream" not in response.encode(1)


def test_acknowledgements_byte_for_byte() -> None:
    frames = {
        (2, "ID-1"): b'\x00\x00\x00\x38{"error":"","id":"ID-1","result":null,"stream_url":null}',
        (3, "ID-1"): b'\x00\x00\x00\x37{"error":"","id":"ID-1","result":null,"streamURL":null}',
        (2, ""): b'\x00\x00\x00\x34{"error":"","id":"","result":null,"stream_url":null}',
        (3, ""): b'\x00\x00\x00\x33{"error":"","id":"","result":null,"streamURL":null}',
    }
    for (wire, id), bytes_ in frames.items():
        ack = ok_ack(msgspec.json.encode(id), wire, False)
        assert struct.pack(">I", len(ack)) + ack == bytes_
        assert ack == Response(id).encode(wire)
        assert ok_ack(msgspec.json.encode(id), wire, True) == Response(id).encode(wire, extended=True)


def test_a_refusal_byte_for_byte() -> None:
    assert (
        Response("i", error=BadRequest("missing response hook")).encode(2)
        == b'{"error":"missing response hook","id":"i","result":null,"stream_url":null}'
    )


def test_details_of_an_error_go_to_those_who_asked() -> None:
    error = WorkerLost("died", receipt={"signal": 9})
    assert b"error_info" not in Response("i", error=error).encode(3)
    assert Response("i", error=error).encode(3, extended=True) == (
        b'{"error":"died","id":"i","result":null,"streamURL":null,'
        b'"error_info":{"code":"worker_lost","message":"died","receipt":{"signal":9}},"acomm":1}'
    )


@pytest.mark.parametrize("error", [TaskError(""), AcommError(""), TaskError("", type="KeyError")])
def test_an_error_without_a_text_is_still_no_success(error: AcommError) -> None:
    again = Response.decode(Response("i", error=error).encode())
    assert again.error is not None
    assert str(again.error) in ("task_error", "error", "KeyError")


class Odd:
    def __repr__(self) -> str:
        return "<odd>"


@pytest.mark.parametrize(
    "receipt",
    [{"a": Odd()}, {"a": ["x\ud800"]}, {"\ud800": 1}, {(1, 2): 3}, {"a": 10**30, "b": b"x"}, {"n": math.nan}],
)
def test_an_error_reaches_its_caller_whatever_is_in_it(receipt: dict[Any, Any]) -> None:
    error = WorkerLost("bad \ud800 text", receipt=receipt)
    again = Response.decode(Response("i", error=error).encode(extended=True))
    assert str(again.error) == "bad ? text"
    assert isinstance(again.error, WorkerLost)
    assert again.error.receipt


def test_a_receipt_that_holds_itself_is_cut() -> None:
    receipt: dict[str, Any] = {}
    receipt["again"] = receipt
    assert Response.decode(Response("i", error=WorkerLost("x", receipt=receipt)).encode(extended=True)).error


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b'{"error":""}',
        b'{"error":null}',
        b'{"ERROR":"","ID":"x","RESULT":null,"STREAMURL":null}',
        b'{"error":"","id":"i","result":null,"stream_url":null}\n',
        b'{"error":"","keepalive":true,"nested":{"error":"x","a":[{}]}}',
    ],
)
def test_rows_that_are_a_good_acknowledgement(data: bytes) -> None:
    response = Response.decode(data)
    assert (response.error, response.result, response.stream_url) == (None, None, None)


@pytest.mark.parametrize(
    "data",
    [
        b'{"error":{"text":"x"}}',
        b'{"error":5}',
        b'{"id":5}',
        b'{"stream_url":5}',
        b"[]",
        b"",
        b"null",
        b'{"error":""}x',
        b'{"error":""}{"error":""}',
        b'{"error":"","error":"x"}',
        b'{"result":1e999}',
        b'{"result":"\\udc00"}',
        b'{"error":"\\ud800"}',
        b'{"error":"x","error_info":{"receipt":1e999}}',
    ],
)
def test_rows_that_are_no_acknowledgement(data: bytes) -> None:
    with pytest.raises(BadRequest):
        Response.decode(data)


def test_a_stream_given_as_text_is_taken_though_go_would_not() -> None:
    assert Response.decode(b'{"stream_url":"unix:///s.sock"}').stream_url == "unix:///s.sock"


@pytest.mark.parametrize(
    "data",
    [
        b'{"stream_url":%b}' % URL,
        b'{"streamURL":%b}' % URL,
        b'{"streamURL":null,"stream_url":%b}' % URL,
        b'{"streamURL":%b,"stream_url":null}' % URL,
    ],
)
def test_a_stream_is_found_under_either_key(data: bytes) -> None:
    assert Response.decode(data).stream_url == HOOK


def test_an_error_comes_as_its_class() -> None:
    error = Busy("full", retry_after=2.0)
    again = Response.decode(Response("i", error=error).encode(extended=True))
    assert again.error == error
    assert isinstance(again.error, Busy)
    assert Response.decode(Response("i", error=error).encode()).error == AcommError("full")


def test_a_peer_may_send_both_result_and_error_we_may_not() -> None:
    response = Response.decode(b'{"error":"x","result":[1]}')
    assert response.error == AcommError("x")
    assert bytes(response.result) == b"[1]"
    with pytest.raises(ValueError, match="not both"):
        Response("i", 1, TaskError("x"))
    wrong: Any = "text"
    with pytest.raises(TypeError, match="must be an AcommError"):
        Response("i", error=wrong)


def test_result_as_gives_the_result_or_raises_the_error() -> None:
    assert Response("i", {"a": (1, 2)}).result_as(dict[str, list[int]]) == {"a": [1, 2]}
    assert Response.decode(b'{"result":null}').result_as(type(None)) is None
    with pytest.raises(TaskError, match="boom"):
        Response("i", error=TaskError("boom")).result_as(int)
    with pytest.raises(BadRequest, match=r"^result: "):
        Response("i", "x").result_as(int)


@pytest.mark.parametrize("wire", [1, 2, 3])
def test_only_who_asked_is_told_what_a_stream_is_made_of(wire: int) -> None:
    request = Request("t", id="i", extended=True)
    response = Response.to(request, stream_url="unix:///s.sock", stream_format="lines")
    assert b"stream_format" not in response.encode(wire)
    told = response.encode(wire, extended=True)
    assert told.endswith(b',"stream_format":"lines","acomm":1}')
    assert Response.decode(told).stream_format == "lines"
    assert Response.decode(response.encode(wire)).stream_format is None
    assert b"stream_format" not in Response("i", 1).encode(wire, extended=True)


def test_a_stream_format_is_text() -> None:
    with pytest.raises(BadRequest, match="stream_format: Expected str, got int"):
        Response.decode(b'{"error":"","id":"i","stream_format":5}')


def test_a_response_to_a_request_answers_in_kind() -> None:
    request = Request("t", id="i", extended=True)
    assert Response.to(request, 5) == Response("i", 5, extended=True)
    assert Response.to(request, error="boom").error == AcommError("boom")
    assert Response.to(request, error="").error is None


# -- for both ---------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # U+D800 to U+DFFF are no characters.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)
labels = st.text(
    st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=40
)
hooks = st.sampled_from([HOOK, "http://h:8080/p?x=1&y=2", "unix:///run/with space.sock", "https://[::1]/é"])


@given(labels, labels, json_values, hooks, st.sampled_from([1, 2, 3]), st.booleans())
def test_requests_come_back(id: str, task: str, args: Any, hook: str, wire: int, extended: bool) -> None:
    request = Request(task, args, id=id, response_hook=hook, timeout=1.5, priority=7)
    again = Request.decode(request.encode(wire, extended=extended), raw=wire == 1)
    assert (again.id, again.task, again.timeout, again.priority) == (id, task, 1.5, 7)
    assert (again.wire, again.extended) == (wire, extended)
    assert again.args_as(Any) == args
    assert again.encode(wire, extended=extended) == request.encode(wire, extended=extended)


@given(labels, json_values, st.none() | st.text(min_size=1), st.sampled_from([1, 2, 3]), st.booleans())
def test_responses_come_back(id: str, result: Any, text: str | None, wire: int, extended: bool) -> None:
    error = None if text is None else TaskError(text)
    response = Response(id, None if error else result, error)
    again = Response.decode(response.encode(wire, extended=extended))
    assert again.id == id
    assert again.extended is extended
    assert (again.error is None) is (error is None)
    if error is None:
        assert again.result_as(Any) == result
    elif extended:
        assert isinstance(again.error, TaskError)


VALID = [
    go_request(1),
    go_request(3, args={"a": [1, "é\u2028"]}, acomm=1, timeout=5, priority=1, handlers={"success": "x"}),
    Request("t", {"x": [1.5, None, "\u00e9"]}, response_hook="http://h/p").encode(3, extended=True),
    Response("i", {"a": [1, 2]}, stream_url=HOOK).encode(2),
    Response("i", error=WorkerLost("x", receipt={"a": 1})).encode(3, extended=True),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(
            st.binary(max_size=4)
            | st.sampled_from(
                [b"\\ud800", b"1e999", b"null", b"{", b"]", b'"', b'"id":1,', b"\\u0000", b"-", b"9" * 5000]
            )
        )
        data[at : at + draw(st.integers(0, 8))] = piece
    return bytes(data)


@given(st.binary(max_size=80) | mutated(), st.booleans())
@example(b'{"id":"i","task":"t","taskURL":null,"priority":' + b"9" * 5000 + b"}", False)
@example(b'{"error":"x","error_info":{"retry_after":' + b"9" * 400 + b"}}", False)
def test_decoding_raises_nothing_but_bad_request(data: bytes, raw: bool) -> None:
    try:
        request = Request.decode(data, raw=raw)
    except BadRequest as error:
        assert str(error).isprintable() or "\n" not in str(error)
    else:
        assert json.loads(data)  # what we accept is JSON to everyone
        assert (
            Request.decode(request.encode(request.wire, extended=request.extended), raw=raw).id == request.id
        )
    try:
        response = Response.decode(data)
    except BadRequest:
        pass
    else:
        assert Response.decode(response.encode(2)).id == response.id
    id, wire, _, hook = salvage(data, raw=raw)
    assert id.isprintable()
    assert wire in (1, 2, 3)
    assert hook is None or "://" in hook


@pytest.mark.parametrize(
    ("data", "raw", "found"),
    [
        (b"hello", False, ("", 2, False, None)),
        (b"hello", True, ("", 1, False, None)),
        (go_request(2, task=""), False, ("i", 2, False, HOOK)),
        (go_request(3, task="", acomm=1), False, ("i", 3, True, HOOK)),
        (go_request(1, task=5), True, ("i", 1, False, HOOK)),
        (go_request(3, id=5), False, ("", 3, False, HOOK)),
        (go_request(3, id="a\0b", hook="tcp://x"), False, ("", 3, False, None)),
        (b'{"id":"a","id":"b","task":""}', False, ("b", 2, False, None)),
    ],
)
def test_what_can_be_saved_of_a_bad_request(data: bytes, raw: bool, found: tuple[Any, ...]) -> None:
    assert salvage(data, raw=raw) == found


@pytest.mark.parametrize("payload", [None, msgspec.Raw(b"null"), msgspec.Raw(b" null ")])
def test_a_bare_null_is_never_sent(payload: Any) -> None:
    with pytest.raises(ValueError, match="kill a Go peer"):
        encode_payload(payload, 3)


def test_payloads_of_other_kinds_are_json() -> None:
    assert encode_payload({"a": None}, 3) == b'{"a":null}'
    assert encode_payload(b"{}", 3) == b"{}"
    assert encode_payload(Response(""), 2) == b'{"error":"","id":"","result":null,"stream_url":null}'


async def test_responding_without_a_hook_is_an_error() -> None:
    with pytest.raises(BadRequest, match="no response hook"):
        await Request("t").respond(Response("i"))


async def test_the_handler_that_fits_is_run() -> None:
    ran: list[tuple[str, Request, Response]] = []

    async def failed(request: Request, response: Response) -> None:
        ran.append(("error", request, response))

    request = Request("t", on_success=lambda *seen: ran.append(("success", *seen)), on_error=failed)
    good, bad = Response("i", 1), Response("i", error=TaskError("x"))
    await request.handle_response(good)
    await request.handle_response(bad)
    await Request("t").handle_response(good)
    assert ran == [("success", request, good), ("error", request, bad)]
    assert messages.Handlers.pack(None, None) is None


def test_arguments_do_not_keep_a_message_that_is_much_larger() -> None:
    """What is in it besides is dropped, and counts for nobody."""
    data = b'{"id":"a","task":"t","responseHook":null,"args":[1],"unknown":"%b"}' % (b"x" * 100_000)
    before = sys.getrefcount(data)
    request = Request.decode(data)
    assert bytes(request.args) == b"[1]"
    assert sys.getrefcount(data) == before
