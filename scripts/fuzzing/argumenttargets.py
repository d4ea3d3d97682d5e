"""Arguments for tasks of all kinds of signatures."""

from __future__ import annotations

import dataclasses
import datetime
import random
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from acomm import jsontext
from acomm.errors import BadArgs, BadRequest
from workers.signature import Parameters


@dataclasses.dataclass
class _Point:
    x: float
    y: float = 0.0


class _Tree(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    of: list[_Tree] = []


class _Pair(NamedTuple):
    key: str
    value: int | None = None


def _untyped(value=None, *rest, **more): ...  # type: ignore[no-untyped-def]
def _plain(a: int, b: float = 1.0, /, c: str = "", *, d: bool = False) -> None: ...
def _narrow(
    a: Annotated[int, msgspec.Meta(ge=0, le=9)], b: Literal["x", 1], c: bytes, d: set[int]
) -> None: ...
def _nested(tree: _Tree) -> None: ...
def _mixed(points: list[_Point], pairs: dict[str, _Pair], when: datetime.datetime | None = None) -> None: ...
def _whole(point: _Point) -> None: ...


class Arguments:
    """Arguments of calls, by all kinds of signatures: bound or refused, and the check says the same."""

    def __init__(self) -> None:
        functions = (_untyped, _plain, _narrow, _nested, _mixed, _whole)
        self._all = [Parameters(function, function.__name__, "here:1") for function in functions]

    def samples(self) -> list[bytes]:
        point, when = b'{"x":1.5,"y":-0.0}', b'"2026-01-02T03:04:05Z"'
        made = [
            b"[1,2.5]",
            b'{"a":1,"b":2.5,"c":"\xc3\xa9","d":true}',
            b'[3,"x","AAEC",[1,2]]',
            b"null",
            b"7",
        ]
        made += [
            b'{"name":"a","of":[{"name":"b"},{"name":"\\ud83d\\ude00","of":[]}]}',
            point,
            b"[%b]" % point,
        ]
        pairs = b'{"a":["b",1],"\\u0061b":["c",null]}'
        made += [b'{"points":[%b],"pairs":%b,"when":%b}' % (point, pairs, when), b"[[%b],{}]" % point]
        return [*made, b'{"value":{"value":[[[{}]]]},"x":1e300,"y":-12345678901234567890}']

    def feed(self, data: bytes, dice: random.Random) -> None:
        try:
            raw = jsontext.raw_value(data, "the arguments")
        except BadRequest:
            raw = msgspec.Raw(data)  # whoever calls it has refused this; it is to hold nevertheless
        for parameters in self._all:
            bound, refusal = self._bound(parameters, raw)
            try:
                parameters.check(raw)
            except BadArgs as error:
                assert str(error) == refusal, (str(error), refusal)
            else:
                assert refusal is None, refusal
            try:
                slowly = parameters._bind_one_by_one(bytes(raw))
            except BadArgs:
                assert bound is None, bound
            else:
                assert repr(slowly) == repr(bound), (slowly, bound)

    def _bound(self, parameters: Parameters, raw: msgspec.Raw) -> tuple[Any, str | None]:
        try:
            return parameters.bind(raw), None
        except BadArgs as error:
            assert len(str(error)) < 1000, str(error)
            return None, str(error)
