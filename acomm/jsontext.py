"""JSON text: the decisions on what is valid, in one place, on top of msgspec.

msgspec does the parsing and writing. What it leaves open is decided here: NaN and infinities do not
become `null` in silence, text is UTF-8 without lone surrogates, numbers stay in range, and nesting
has an end.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, TypeVar

import msgspec

from acomm.errors import BadRequest, printable

T = TypeVar("T")

_encode = msgspec.json.encode
_raw_decoder = msgspec.json.Decoder(msgspec.Raw)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
# A number is in range if its digits before the exponent are fewer than 200 and the exponent's two.
_suspicious = re.compile(rb"\\u[dD]|[eE]\+?\d{3}")
_number_shapes = bytes(
    ord("0") if byte in b"0123456789" else ord("e") if byte in b"eE" else byte if byte == ord("+") else 0
    for byte in range(256)
)
_MANY_DIGITS = b"0" * 200
_space = re.compile(rb"[ \t\r\n]*")
# Possessive: what could be gone back to would be kept, sixty bytes for each escape.
_name = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_AFTER_VALUE = frozenset(b",} \t\r\n")

MAX_MEMBERS = 1000
"""Of an object that is taken apart here. Messages have some ten; a frame has room for millions, and each of
them costs some microseconds.
"""

INVALID = (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError)
"""What decoding JSON from a stranger can raise."""


def encode(value: Any, what: str = "value") -> bytes:
    """`value` as compact JSON; `what` names it in errors. A msgspec.Raw passes as it is.

    Raises TypeError, saying where, for what JSON cannot express: an unknown type, a lone surrogate,
    NaN and infinity (which msgspec by itself would turn into null), a value that holds itself.
    """
    try:
        data = _encode(value)
    except Exception as error:
        fault = _fault_text(value, what, frozenset())
        raise TypeError(fault or f"{what} cannot be written as JSON: {error}") from error
    if b"null" in data and (fault := _fault_text(value, what, _NEVER_NULL)):
        raise TypeError(fault)
    return data


def encode_anyhow(value: Any) -> bytes:
    """JSON of what may hold lone surrogates, as exception messages do, or things that JSON cannot
    express, as receipts may: an error must reach its caller whatever is in it.
    """
    try:
        return _encode(value)
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):
        return _encode(_replaced(value))


_MAX_DEPTH = 20


def _replaced(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, bool | float):
        return value
    if depth == _MAX_DEPTH:
        return "..."
    if isinstance(value, dict):
        return {_replaced(str(key)): _replaced(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, depth + 1) for item in value]
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    return _replaced(printable(repr(value)))


_NEVER_NULL: frozenset[type] = frozenset({str, int, bool, bytes, type(None), msgspec.Raw})
"""Types whose values need no second look once they were encoded; most of any message is of these."""


def _fault_text(value: Any, what: str, skip: frozenset[type]) -> str | None:
    try:
        fault = _fault(value, skip)
    except RecursionError:
        return f"{what} is nested too deeply, or holds itself"
    return None if fault is None else f"{what}{printable(fault[0])} {fault[1]}"


def _fault(value: Any, skip: frozenset[type]) -> tuple[str, str] | None:
    """The path and the nature of the first thing in `value` that JSON cannot express; with types to
    `skip`, the value as a whole has been encoded, so that only its floats are in doubt.
    """
    if type(value) in skip:
        return None
    if type(value) is float:
        return None if math.isfinite(value) else ("", f"is {value}, which JSON cannot express")
    if isinstance(value, Enum):
        return _fault(value.value, skip)
    for step, item in _children(value):
        if fault := _fault(item, skip):
            return _step(step) + fault[0], fault[1]
    return None if skip or value is msgspec.UNSET else _own_fault(value)


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    elif not isinstance(value, type):
        # Asked of the class, as an instance may answer to any name.
        cls = type(value)
        fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
        names = [field.name for field in (*fields, *getattr(cls, "__attrs_attrs__", ()))]
        names += getattr(cls, "__struct_fields__", ())
        yield from ((name, getattr(value, name, None)) for name in names)


def _own_fault(value: Any) -> tuple[str, str] | None:
    """What is wrong with `value` when nothing is wrong with what it holds."""
    if isinstance(value, dict):
        for key in value:
            if (fault := _encoding_fault({key: 0})) is not None:
                return "", f"has the key {printable(repr(key), 50)}: it {fault[1]}"
        return None
    return _encoding_fault(value)


def _encoding_fault(value: Any) -> tuple[str, str] | None:
    try:
        _encode(value)
    except UnicodeEncodeError:
        return "", "holds a lone surrogate, which UTF-8 cannot express"
    except TypeError:
        cls = type(next(iter(value)) if isinstance(value, dict) else value)
        name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
        return "", f"is of type {name}, which JSON cannot express"
    except RecursionError:
        raise
    except Exception as error:
        return "", f"cannot be written as JSON: {printable(error)}"
    return None


def _step(step: Any) -> str:
    return f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]"


def why_invalid(error: BaseException, data: bytes | memoryview) -> str:
    """One line for people on why `data` did not decode."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    if not data:
        return "empty message"
    text = str(error)
    if text == "Input data was truncated":
        return "text ends too early, or holds half of a surrogate pair"
    return text


def parse(data: bytes | memoryview, what: str = "JSON") -> Any:
    """Decode JSON to plain objects. Raises BadRequest."""
    try:
        return msgspec.json.decode(data)
    except INVALID as error:
        raise BadRequest(f"{what}: {why_invalid(error, data)}") from None


def parse_as(decoder: msgspec.json.Decoder[T], data: bytes | memoryview, what: str) -> T:
    """Decode JSON with a typed decoder. Raises BadRequest."""
    try:
        return decoder.decode(data)
    except INVALID as error:
        raise BadRequest(f"{what}: {why_invalid(error, data)}") from None


def raw_value(data: bytes, what: str) -> msgspec.Raw:
    """`data` as one JSON value that is left undecoded. Raises BadRequest unless it is valid."""
    raw = parse_as(_raw_decoder, data, what)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{what}: {why_invalid(error, data)}") from None
    check_value(raw, what)
    return raw


def check_value(raw: msgspec.Raw, what: str) -> None:
    """Refuse in `raw` what the envelope's parser steps over: lone surrogates, numbers out of range.

    Most text shows by a search for their shapes that it has none of those; only the rest is decoded.
    """
    view = memoryview(raw)
    # The search by expression starts sooner and runs five times slower.
    if _suspicious.search(view) if len(view) < 128 else _looks_suspicious(bytes(view)):
        parse(view, what)


def _looks_suspicious(data: bytes) -> bool:
    shapes = data.translate(_number_shapes)
    numbers = b"0e000" in shapes or b"0e+000" in shapes or _MANY_DIGITS in shapes
    return numbers or b"\\ud" in data or b"\\uD" in data


def object_fields(data: bytes, once: frozenset[str], what: str) -> dict[str, msgspec.Raw]:
    """The members of the JSON object `data`, undecoded, by name.

    Raises BadRequest for anything that is not one JSON object in UTF-8, and for a repeat (in any
    case) of a name in `once`, which holds case-folded names, and for more than MAX_MEMBERS.
    """
    try:
        fields = _fields_decoder.decode(data)
        data.decode()
    except INVALID as error:
        reason = why_invalid(error, data)
        raise BadRequest(f"{what} is not a JSON object: {reason}") from None
    if len(fields) > MAX_MEMBERS:
        raise _too_many(what)
    # In compact JSON the members' lengths add up to the whole exactly when nothing was dropped and
    # no name has an escape: proof, for a microsecond, that no name is repeated.
    size = 1
    for name, value in fields.items():
        size += len(name) + 4 + len(memoryview(value))
    if size != len(data):
        _refuse_repeats(data, fields, once, what)
    return fields


def _refuse_repeats(data: bytes, fields: dict[str, msgspec.Raw], once: frozenset[str], what: str) -> None:
    """Walk over the members of `data`, which is valid, and refuse a repeat of a name in `once`."""
    # The last value of a name is nearly always the only one, and then its length tells where it ends.
    last = {name: bytes(value) for name, value in fields.items()}
    text = ""
    seen: set[str] = set()
    left, position = MAX_MEMBERS, _skip(data, _skip(data, 0) + 1)
    while (match := _name.match(data, position)) is not None:
        if not left:
            raise _too_many(what)
        left -= 1
        name = msgspec.json.decode(match[0], type=str)
        folded = name.casefold()
        if folded in seen and folded in once:
            raise BadRequest(f"{what} has the key {folded!r} twice")
        seen.add(folded)
        start = _skip(data, _skip(data, match.end()) + 1)
        end = start + len(last[name])
        if not data.startswith(last[name], start) or data[end] not in _AFTER_VALUE:
            # Once a message, and a character a byte, so that places in it are places in `data`.
            text = text or data.decode("latin-1")
            end = _end_of_value(text, start, what)
        position = _skip(data, end)
        if data[position : position + 1] == b",":
            position = _skip(data, position + 1)


def _too_many(what: str) -> BadRequest:
    return BadRequest(f"{what} has more than {MAX_MEMBERS} members")


def _end_of_value(text: str, start: int, what: str) -> int:
    """Where the value at `start` of valid JSON ends."""
    from json import JSONDecoder

    # Only the end is wanted, so numbers are read in the cheapest way that cannot fail.
    try:
        return JSONDecoder(parse_int=float).raw_decode(text, start)[1]
    except RecursionError:
        raise BadRequest(f"{what}: nested too deeply") from None


def _skip(data: bytes, position: int) -> int:
    match = _space.match(data, position)
    assert match is not None
    return match.end()
