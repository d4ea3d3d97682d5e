"""JSON text: the decisions on what is valid, in one place, on top of msgspec.

msgspec does the parsing and writing. What it leaves open is decided here: NaN and infinities do not
become `null` in silence, text is UTF-8 without lone surrogates, numbers stay in range, and nesting
has an end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from json import JSONDecoder
from json.decoder import scanstring  # type: ignore[attr-defined]  # the standard library's C scanner
from typing import Any, TypeVar

import msgspec

from acomm.errors import BadRequest

T = TypeVar("T")

_encode = msgspec.json.encode
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_suspicious = re.compile(rb"\\u[dD]|[eE]\+?\d{3}|\d{300}")
_space = re.compile(r"[ \t\r\n]*")
# Only the ends of values are wanted, so numbers are read in the cheapest way that cannot fail.
_scanner = JSONDecoder(parse_int=float)

INVALID = (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError)
"""What decoding JSON from a stranger can raise."""


def encode(value: Any, what: str = "value") -> bytes:
    """`value` as compact JSON. A msgspec.Raw passes as it is.

    Raises TypeError for what JSON cannot express (naming the place of a NaN), UnicodeEncodeError for
    lone surrogates.
    """
    try:
        text = _encode(value)
    except UnicodeEncodeError as error:
        raise TypeError(f"{what} holds text that is not valid Unicode: {error.reason}") from None
    except RecursionError:
        raise TypeError(f"{what} is nested too deeply, or holds itself") from None
    except TypeError as error:
        raise TypeError(f"{what} cannot be written as JSON: {error}") from None
    # msgspec writes NaN and infinities as null; other nulls are told apart by looking.
    if b"null" in text and not isinstance(value, msgspec.Raw):
        place = _non_finite(value)
        if place is not None:
            raise TypeError(f"{what}{place} is not a finite number; JSON cannot express it")
    return text


def _non_finite(value: Any) -> str | None:
    """Where in `value` a NaN or an infinity is, as a path; None if there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        items = enumerate(value)
    elif hasattr(value, "__struct_fields__") or hasattr(value, "__dataclass_fields__"):
        names = getattr(value, "__struct_fields__", None) or value.__dataclass_fields__
        items = ((name, getattr(value, name, None)) for name in names)
    else:
        return None
    for key, item in items:
        place = _non_finite(item)
        if place is not None:
            return f"[{key!r}]{place}"
    return None


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


def check_value(raw: msgspec.Raw, what: str) -> None:
    """Refuse in `raw` what the envelope's parser steps over: lone surrogates, numbers out of range.

    Most text shows by a scan at memory speed that it has none of those; only the rest is decoded.
    """
    view = memoryview(raw)
    if _suspicious.search(view):
        parse(view, what)


def object_fields(data: bytes, once: frozenset[str], what: str) -> dict[str, msgspec.Raw]:
    """The members of the JSON object `data`, undecoded, by name.

    Raises BadRequest for anything that is not one JSON object in UTF-8, and for a repeat (in any
    case) of a name in `once`, which holds case-folded names.
    """
    try:
        fields = _fields_decoder.decode(data)
        data.decode()
    except INVALID as error:
        reason = why_invalid(error, data)
        raise BadRequest(f"{what} is not a JSON object: {reason}") from None
    # In compact JSON the members' lengths add up to the whole exactly when nothing was dropped and
    # no name has an escape: proof, for a microsecond, that no name is repeated.
    size = 1
    for name, value in fields.items():
        size += len(name) + 4 + len(memoryview(value))
    if size != len(data):
        _refuse_repeats(data.decode(), once, what)
    return fields


def _refuse_repeats(text: str, once: frozenset[str], what: str) -> None:
    seen: set[str] = set()
    position = _skip(text, _skip(text, 0) + 1)
    try:
        while text[position] == '"':
            name, position = scanstring(text, position + 1)
            folded = name.casefold()
            if folded in seen and folded in once:
                raise BadRequest(f"{what} has the key {folded!r} twice")
            seen.add(folded)
            _, position = _scanner.raw_decode(text, _skip(text, _skip(text, position) + 1))
            position = _skip(text, position)
            if text[position] == ",":
                position = _skip(text, position + 1)
    except RecursionError:
        raise BadRequest(f"{what}: nested too deeply") from None


def _skip(text: str, position: int) -> int:
    match = _space.match(text, position)
    assert match is not None
    return match.end()
