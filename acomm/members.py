"""The members of messages in all their spellings: which keys there are, and how their values are read."""

from __future__ import annotations

from typing import TypeVar, cast

import msgspec

from acomm import jsontext
from acomm.errors import BadRequest, printable

T = TypeVar("T")

MAX_ID = 1024
MAX_TASK = 255
"""Characters."""

REQUEST_KEYS = frozenset(
    "id task args responsehook taskurl streamurl acomm timeout priority handlers detached".split()
)
RESPONSE_KEYS = frozenset("error id result stream_url streamurl acomm error_info stream_format".split())
GENERATION_3_KEYS = frozenset({"responseHook", "taskURL", "streamURL"})

STRING = msgspec.json.Decoder(str | None)


def folded(fields: dict[str, msgspec.Raw], known: frozenset[str], what: str) -> dict[str, msgspec.Raw]:
    """The members by case-folded name. Raises BadRequest for one of the `known` that is there twice."""
    by_name = {_fold.get(name) or name.casefold(): raw for name, raw in fields.items()}
    if len(by_name) < len(fields):
        names = [name.casefold() for name in fields]
        for name in known:
            if names.count(name) > 1:
                raise BadRequest(f"{what} has the key {name!r} twice")
    return by_name


_fold = {
    name: name.casefold()
    for name in (
        "id task args responseHook responsehook taskURL streamURL acomm timeout priority handlers detached "
        "error result stream_url error_info stream_format"
    ).split()
}


def read_text(raw: msgspec.Raw | None, what: str) -> str:
    """A member that is text; empty where it is missing or null. Raises BadRequest."""
    if raw is None:
        return ""
    return read_value(STRING, raw, what) or ""


def read_value(decoder: msgspec.json.Decoder[T], raw: msgspec.Raw | None, what: str) -> T:
    """A member; None where it is missing, which the decoder allows, too. Raises BadRequest, naming it."""
    if raw is None:
        return cast(T, None)
    try:
        return decoder.decode(raw)
    except jsontext.INVALID as error:
        # msgspec names a wrong type by what it expected; the lists of alternatives read badly.
        reason = jsontext.why_invalid(error, memoryview(raw)).replace(" | null", "").replace("`", "")
        raise BadRequest(f"{what}: {reason}") from None


def asks_for_more(raw: msgspec.Raw | None) -> bool:
    """Whether the member `acomm` asks for extension keys."""
    return raw is not None and bytes(raw) == b"1"


def check_name(what: str, value: str, limit: int) -> None:
    """An id or a task's name, of `limit` characters at most. Raises BadRequest, which says what to mend."""
    if not value:
        raise BadRequest(f"missing {what}")
    if len(value) > limit:
        raise BadRequest(f"{what} is longer than {limit} characters")
    if not value.isprintable():
        raise BadRequest(f"{what} holds control characters: {printable(value)}")
