"""JSON text: what is valid is decided once, and a refusal says where."""

import dataclasses
import enum
import json
import math
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acomm import jsontext
from acomm.errors import BadRequest

ONCE = frozenset({"id", "args"})


def keys(data: bytes | str) -> dict[str, bytes]:
    raw = data.encode() if isinstance(data, str) else data
    return {name: bytes(value) for name, value in jsontext.object_fields(raw, ONCE, "request").items()}


# -- reading ----------------------------------------------------------------------------------------


def test_members_come_undecoded() -> None:
    assert keys('{"id":"x","args":{"a": 1.0},"n":null}') == {
        "id": b'"x"',
        "args": b'{"a": 1.0}',
        "n": b"null",
    }
    assert keys("{}") == {}
    assert keys(' \n{ "id" : "x" }\t') == {"id": b'"x"'}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty message"),
        (b"null", "null"),
        (b"[]", "array"),
        (b'"x"', "str"),
        (b"5", "int"),
        (b"hello", "malformed"),
        (b'{"id":1}x', "trailing"),
        (b'{"id":1}{"id":2}', "trailing"),
        (b'{"id":1,}', "trailing comma"),
        (b'{"id":1', "too early"),
        (b"\xef\xbb\xbf{}", "malformed"),
        (b'{"a":NaN}', "malformed"),
        (b'{"a":Infinity}', "malformed"),
        (b'{"a":01}', "malformed"),
        (b'{"a":+1}', "malformed"),
        (b"{'a':1}", "malformed"),
        (b'{"a":"\x01"}', "malformed"),
        (b'{"a":"\\x"}', "malformed"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b'{"\xff":1}', "not UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),  # a surrogate, encoded
        (b'{"\\ud800":1}', "surrogate"),
        (b"\x00\x00\x00\x02{}", "malformed"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_what_is_not_one_json_object_in_utf8_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadRequest, match=f"^request is not a JSON object: .*{reason}"):
        keys(data)


@pytest.mark.parametrize(
    "data",
    [
        '{"id":1,"id":2}',
        '{"id":1, "ID":2}',
        '{"Id" : [1, "}"] , "iD" : 2}',
        '{"\\u0069d":1,"id":2}',
        '{"x":1,"args":[],"x":{"id":1},"Args":"]"}',
        '{ "id":12 ,"id":1}',
    ],
)
def test_a_repeat_of_our_own_keys_is_refused_in_any_spelling(data: str) -> None:
    with pytest.raises(BadRequest, match=r"^request has the key '(id|args)' twice$"):
        keys(data)


@pytest.mark.parametrize(
    "data",
    [
        '{"x":1,"x":2,"id":3}',
        '{ "x" : [1,2,{"id":1}] , "x":"a,\\"}" , "id":3}',
        '{"x":12,"x":1,"id":3}',
        '{"x":1,"x":12,"id":3}',
        '{"x":"é漢","x":"\\"\\\\","id":3}',
        '{"x":"\\\\","id":3 , "y":{"id":1,"id":2}}',
        '{"x":123456789012345678901234567890,"x":-1.5e-3,"id":3}',
        '{"x":true,"x":null,"x":false,"id":3}',
    ],
)
def test_a_repeat_of_others_keys_is_theirs_to_make(data: str) -> None:
    assert keys(data)["id"] == b"3"


def test_a_long_object_with_spaces_is_not_read_twice() -> None:
    """Most other JSON writers put spaces; that must not cost a decode of all the arguments."""
    args = json.dumps([{"a": i} for i in range(1000)])
    data = f'{{"id": "x", "args": {args}}}'.encode()
    assert keys(data)["args"] == args.encode()


def test_an_object_has_no_more_members_than_anybody_needs() -> None:
    """Each one costs time, and a frame has room for millions."""
    most = jsontext.MAX_MEMBERS
    for comma in (",", " , "):
        assert len(keys("{" + comma.join(f'"{n}":1' for n in range(most)) + "}")) == most
    repeats = '{"x":1' + ',"x":22' * most + "}"
    for data in (repeats, "{" + ",".join(f'"{n}":1' for n in range(most + 1)) + "}"):
        with pytest.raises(BadRequest, match=f"^request has more than {most} members$"):
            keys(data)


def test_repeats_cost_no_more_than_their_length() -> None:
    """Looking for the end of each in all that follows would take a minute here."""
    data = "{" + ",".join(f'"x":"{n:050000}"' for n in range(900)) + ',"x":1}'
    assert keys(data) == {"x": b"1"}


def test_a_name_of_nothing_but_escapes_takes_no_more_memory_than_it_is_long() -> None:
    data = b'{ "' + b"\\n" * 300_000 + b'":1,"id":2}'
    tracemalloc.start()
    try:
        assert keys(data)["id"] == b"2"
        assert tracemalloc.get_traced_memory()[1] < 5 * len(data)
    finally:
        tracemalloc.stop()


names = st.text(max_size=4) | st.sampled_from(["id", "ID", "args", "x"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.tuples(names, values), max_size=5), st.booleans(), st.booleans())
def test_repeats_are_found_whatever_the_layout(
    members: list[tuple[str, Any]], spaces: bool, ascii_only: bool
) -> None:
    separators = (" , ", " : ") if spaces else (",", ":")

    def text(value: Any) -> str:
        return json.dumps(value, separators=separators, ensure_ascii=ascii_only)

    data = "{" + separators[0].join(text(n) + separators[1] + text(v) for n, v in members) + "}"
    folded = [name.casefold() for name, _ in members]
    exact = len({name for name, _ in members}) < len(members)
    repeated = any(folded.count(name) > 1 for name in ONCE)
    try:
        found = keys(data)
    except BadRequest:
        assert repeated
        return
    except UnicodeEncodeError:
        return
    assert not (repeated and (exact or spaces))
    assert {n: json.loads(v) for n, v in found.items()} == dict(members)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ \n0e9.-+ntud8', max_size=40).map(str.encode))
def test_whatever_is_accepted_is_json_to_others_too(data: bytes) -> None:
    try:
        fields = jsontext.object_fields(data, ONCE, "request")
        for value in fields.values():
            jsontext.check_value(value, "value")
    except BadRequest:
        return
    assert json.loads(data).keys() == fields.keys()


@pytest.mark.parametrize(
    "value",
    [
        "1e999",
        "-1e400",
        "1E+400",
        "9" * 400 + "e1",
        "9" * 250 + "e99",
        "9" * 5000,
        '"\\ud800"',
        '["\\uDC00\\uD800"]',
        '{"\\ud800":1}',
    ],
)
def test_numbers_out_of_range_and_half_characters_are_refused(value: str) -> None:
    for text in (value, f"[1,{value}]", f'{{"a":{{"b":{value}}}}}', f'["{"x" * 500}",{value}]'):
        with pytest.raises(BadRequest):
            raw = jsontext.object_fields(b'{"args":%b}' % text.encode(), ONCE, "request")["args"]
            jsontext.check_value(raw, "args")


@pytest.mark.parametrize(
    "value", ["1e99", "1e308", "1e-999", "9" * 100, '"\\ud83d\\ude00"', '"\\\\ud800"', '"x e999"', '"\x7f"']
)
def test_what_only_looks_suspicious_passes(value: str) -> None:
    jsontext.check_value(msgspec.Raw(value.encode()), "args")
    jsontext.check_value(msgspec.Raw(f'["{"x" * 500}",{value}]'.encode()), "args")


def test_parse_and_parse_as_raise_nothing_but_bad_request() -> None:
    decoder = msgspec.json.Decoder(list[int])
    assert jsontext.parse(b"[1]") == [1]
    assert jsontext.parse_as(decoder, b"[1]", "ids") == [1]
    for data in (b"", b"[1", b'["x"]', b"\xff", b"[" * 100_000, b"[1e999]", b'["\\ud800"]'):
        with pytest.raises(BadRequest, match=r"^ids: "):
            jsontext.parse_as(decoder, data, "ids")
    for data in (b"", b"[1", b"\xff", b"[" * 100_000, b"[1e999]", b'["\\ud800"]', b"9" * 5000):
        with pytest.raises(BadRequest, match=r"^JSON: "):
            jsontext.parse(data)


# -- writing ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    x: float
    y: Any = None


class Struct(msgspec.Struct):
    x: float
    y: Any = None


class Level(enum.Enum):
    BAD = math.inf
    GOOD = 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "result is nan, which JSON cannot express"),
        ([1, 2, 3, {"x": math.nan}], "result[3].x is nan, which JSON cannot express"),
        ({"a b": (0.0, -math.inf)}, "result['a b'][1] is -inf, which JSON cannot express"),
        ({1: math.inf}, "result[1] is inf, which JSON cannot express"),
        ([None, Point(math.nan)], "result[1].x is nan, which JSON cannot express"),
        (Struct(0.0, [math.nan]), "result.y[0] is nan, which JSON cannot express"),
        ([Level.BAD], "result[0] is inf, which JSON cannot express"),
        ({"a": [object()]}, "result.a[0] is of type object, which JSON cannot express"),
        (Point(1.0, Level), "result.y is of type enum.EnumType, which JSON cannot express"),
        ({(1, 2): 3}, "result has the key (1, 2): it is of type tuple, which JSON cannot express"),
        (["a\ud800"], "result[0] holds a lone surrogate, which UTF-8 cannot express"),
        ({"\ud800": 1}, r"result has the key '\ud800': it holds a lone surrogate"),
        ({"a\x1b[31m": object()}, r"result['a\x1b[31m'] is of type object"),
    ],
)
def test_what_json_cannot_express_is_refused_with_its_place(value: Any, text: str) -> None:
    with pytest.raises(TypeError) as caught:
        jsontext.encode(value, "result")
    assert str(caught.value).startswith(text)


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="args is nested too deeply, or holds itself"):
        jsontext.encode(loop, "args")
    with pytest.raises(TypeError, match="args is nested too deeply, or holds itself"):
        jsontext.encode([None, loop], "args")


def test_an_integer_beyond_all_limits_is_a_type_error_too() -> None:
    with pytest.raises(TypeError, match="digits"):
        jsontext.encode([10**5000], "args")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, b"null"),
        ({"a": [None, 1.5, "null", True]}, b'{"a":[null,1.5,"null",true]}'),
        (msgspec.Raw(b'{"a":  null}'), b'{"a":  null}'),
        ([msgspec.Raw(b"null"), None], b"[null,null]"),
        (Struct(1.0), b'{"x":1.0,"y":null}'),
        (Level.GOOD, b"1.0"),
        ("é<>&\u2028", '"é<>&\u2028"'.encode()),
    ],
)
def test_the_rest_is_written_compact(value: Any, text: bytes) -> None:
    assert jsontext.encode(value) == text


@given(values)
def test_what_is_written_is_read_back(value: Any) -> None:
    try:
        data = jsontext.encode(value)
    except TypeError:
        assert "\\ud" in ascii(value)
        return
    assert json.loads(data) == value
