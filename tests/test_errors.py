"""Errors: they survive pickling, travel by code, and show strangers' text safely."""

import copy
import pickle
from typing import Any

import pytest

from acomm import errors
from acomm.errors import (
    AcommError,
    Busy,
    CallTimeout,
    ConnectionLost,
    TaskError,
    WorkerLost,
    from_wire,
    printable,
)

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, AcommError)]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("clone", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_survives_copying_with_all_it_knows(cls: type[AcommError], clone: Any) -> None:
    error = cls("text", type="ValueError", traceback="tb", receipt={"signal": 9}, retry_after=1.5)
    again = clone(error)
    assert type(again) is cls
    assert again == error
    assert str(again) == "text"
    assert again.info() == error.info()
    assert again.args == ("text",)


@pytest.mark.parametrize("cls", errors.WIRE_ERRORS.values())
def test_an_error_comes_back_from_the_wire_as_its_class(cls: type[AcommError]) -> None:
    error = cls("text", type="T", traceback="tb", receipt={"a": 1}, retry_after=2.0)
    assert from_wire(str(error), error.info()) == error
    assert type(from_wire(str(error), error.info())) is cls


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in errors.WIRE_ERRORS.values()]
    assert len(set(codes)) == len(codes) == 13


@pytest.mark.parametrize(
    "info",
    [
        {},
        None,
        {"code": "no such code"},
        {"code": ["unhashable"]},
        {"code": 5, "type": [], "traceback": {}, "receipt": "r", "retry_after": "soon"},
        {"retry_after": True},
        {"retry_after": -1},
        {"retry_after": 10**400},
        {"retry_after": 1e300},
        {"code": "connection_lost"},
    ],
)
def test_a_peer_cannot_break_us_with_error_info(info: dict[str, Any] | None) -> None:
    error = from_wire("text", info)
    assert type(error) is AcommError
    assert error == AcommError("text")


def test_errors_are_caught_under_their_standard_names() -> None:
    with pytest.raises(TimeoutError):
        raise CallTimeout("late")
    with pytest.raises(ConnectionError):
        raise ConnectionLost("gone")


def test_equality_is_by_code_and_content() -> None:
    assert TaskError("a") == TaskError("a")
    assert TaskError("a") != TaskError("b")
    assert TaskError("a") != WorkerLost("a")
    assert Busy("a", retry_after=1) != Busy("a")
    assert TaskError("a") != "a"
    assert len({TaskError("a"), TaskError("a"), WorkerLost("a")}) == 2


def test_a_repr_names_class_and_text() -> None:
    assert repr(TaskError("it's")) == """TaskError("it's")"""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain é 漢", "plain é 漢"),
        ("a\nb\x1b[31m\0", r"a\nb\x1b[31m\x00"),
        ("\u2028\u202e", r"\u2028\u202e"),
        ("\ud800", r"\ud800"),
        ("x" * 300, "x" * 200 + "..."),
        (7, "7"),
    ],
)
def test_printable_is_one_safe_line(value: object, shown: str) -> None:
    assert printable(value) == shown
