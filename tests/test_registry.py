"""Tasks: decoration, arguments and results between JSON and Python, and the registry of modules."""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import datetime
import enum
import functools
import math
import pathlib
import pickle
import sys
import threading
import typing
from typing import Annotated, Any, TypedDict

import dill
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acomm.errors import BadArgs, ConfigError, TaskError, TooLarge
from workers.options import Retry
from workers.registry import Registry, Task, encode_result, task


class Point(msgspec.Struct):
    x: int
    y: int = 0


@dataclasses.dataclass
class Order:
    id: int
    at: Point | None = None


class Row(TypedDict):
    name: str


class Even(msgspec.Struct):
    n: int

    def __post_init__(self) -> None:
        if self.n % 2:
            raise KeyError("odd")


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    tricks: int


@task
def add(a: int, b: int = 2) -> int:
    """Adds two numbers.

    And nothing else.
    """
    return a + b


@task
def late(item: Later) -> Later:
    return item


class Later(msgspec.Struct):
    n: int


def _plain(a: int) -> int:
    return a


renamed = task(
    name="renamed",
    timeout=3,
    priority=2,
    retry=Retry(1),
    concurrency=4,
    key="a",
    isolated=True,
    max_memory=10**7,
)(_plain)


def refusal(item: Task[..., Any], raw: bytes) -> str:
    with pytest.raises(BadArgs) as caught:
        item.bind(raw)
    with pytest.raises(BadArgs):
        item.check_args(raw)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 400
    return text


# The decorator


def test_a_task_is_still_the_function():
    assert add(1) == 3
    assert (add.name, add.module, add.__doc__) == ("add", __name__, add.function.__doc__)
    assert add.location.rpartition("/")[2].startswith("test_registry.py:")
    assert (add.timeout, add.priority, add.retry, add.is_coroutine) == (None, 0, None, False)
    assert repr(add) == f"<Task add {add.location}>"


def test_options_and_coroutines():
    @task(name="billing.charge", timeout=1.5, priority=-1, retry=Retry(2))
    async def charge() -> None: ...

    assert (charge.name, charge.timeout, charge.priority, charge.retry) == (
        "billing.charge",
        1.5,
        -1,
        Retry(2),
    )
    assert charge.is_coroutine
    assert task(concurrency=2)(_plain).concurrency == 2 and charge.concurrency is None


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": math.inf},
        {"timeout": math.nan},
        {"timeout": "5"},
        {"timeout": True},
        {"soft_timeout": 0},
        {"soft_timeout": math.nan},
        {"soft_timeout": 2, "timeout": 2},
        {"priority": 1.5},
        {"priority": True},
        {"concurrency": 0},
        {"concurrency": True},
        {"concurrency": 1.5},
        {"retry": 3},
        {"isolated": 1},
        {"cancel_on_disconnect": 1},
        {"max_memory": 0},
        {"max_memory": 5e8},
        {"max_memory": "500M"},
        {"key": 1},
        {"key": ()},
        {"key": ("a", "a")},
        {"key": ["a", 1]},
        {"key": "b"},
        {"name": ""},
        {"name": "a/b"},
        {"name": "a\0b"},
        {"name": "a\nb"},
        {"name": "acomm.stats"},
        {"name": 5},
    ],
)
def test_bad_options_are_refused_at_decoration(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        task(**options)(_plain)


def test_a_soft_limit_is_not_for_streams():
    with pytest.raises(ValueError, match="soft_timeout is not for tasks that stream"):

        @task(soft_timeout=1)
        def items():
            yield 1


def test_a_key_is_not_for_streams():
    with pytest.raises(ValueError, match="key is not for tasks that stream"):

        @task(key="a")
        def items(a: int):
            yield a


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("day", "names 'day', which is no parameter of its own; it has a, b, c"),
        ("rest", "names 'rest', which is no parameter of its own"),
        ("more", "names 'more', which is no parameter of its own"),
        ("c", "names c, whose default <object"),
    ],
)
def test_a_key_that_cannot_be_read_is_refused_at_decoration(key, fault):
    with pytest.raises(ValueError, match=f"task keyed: key {fault}"):

        @task(key=key)
        def keyed(a: int, *rest: int, b: int, c: object = object(), **more: int) -> None: ...


def test_calls_with_equal_values_have_the_same_key():
    @task(key=("user", "when"))
    def report(user: str, /, color: str = "red", *, when: datetime.date | None = None, point: Any = 1): ...

    key = report.call_key(b'["ann", "blue"]')
    assert key == report.call_key(b' {"when": null , "color": "\\u0062lue", "user": "ann"} ')
    others = [b'["bob"]', b'{"user": "ann", "when": "2024-01-01"}']
    assert len({key, *map(report.call_key, others)}) == 3
    with pytest.raises(BadArgs, match="missing argument user"):
        report.call_key(b"[]")
    assert add.call_key(b"no JSON") is None


def test_keys_are_of_values_not_of_their_spelling():
    @task(key="value")
    def anything(value: Any, *rest: int) -> None: ...

    one = anything.call_key(b'[{"a": 1, "b": [true, null]}]')
    assert one == anything.call_key(b'{"value": {"b":[true,null],"a":1}}')
    assert one != anything.call_key(b'[{"a": true, "b": [true, null]}]')
    large = anything.call_key(b'["%s"]' % (b"x" * 1_000_000))
    assert len(large) == 32 and large != anything.call_key(b'["%s"]' % (b"x" * 1_000_001))


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="colour"):
        task(colour="red")(_plain)


def test_what_cannot_be_a_task():
    for wrong in (int, 5, "text", add):
        with pytest.raises(TypeError):
            task(wrong)
    with pytest.raises(ValueError, match="lambda"):
        task(lambda: 1)


def test_the_functions_own_attributes_do_not_replace_the_tasks():
    def f() -> None: ...

    f.name = "other"
    f.function = None
    assert task(f).name == "f"
    assert task(f).function is f


@pytest.mark.parametrize("pickler", [pickle, dill])
def test_a_module_level_task_is_pickled_by_reference(pickler):
    assert pickler.loads(pickler.dumps(add)) is add
    assert copy.deepcopy(add) is add
    assert b"Adds two" not in pickler.dumps(add)


def test_a_task_under_another_name_than_its_function_is_rebuilt():
    again = pickle.loads(pickle.dumps(renamed))
    assert again.function is _plain
    assert (again.name, again.timeout, again.priority, again.retry) == ("renamed", 3, 2, Retry(1))
    assert again.concurrency == 4 and again.key == ("a",) and again.isolated and again.max_memory == 10**7
    assert again.call_key(b"[1]") == renamed.call_key(b'{"a": 1}')


# Retry


def test_retry_delays_double_up_to_the_maximum():
    retry = Retry(9, backoff=0.5, max_backoff=3, jitter=False)
    assert [retry.delay(n) for n in (1, 2, 3, 4, 10_000)] == [0.5, 1, 2, 3, 3]
    assert Retry(1, backoff=0, jitter=False).delay(5) == 0


def test_jitter_takes_at_most_half_away():
    retry = Retry(1, backoff=1)
    assert retry.delay(2, random=lambda: 0.0) == 1.0
    assert retry.delay(2, random=lambda: 1.0) == 2.0


def test_retry_is_validated_and_frozen():
    assert Retry(1, on=OSError).on == (OSError,)
    assert pickle.loads(pickle.dumps(Retry(1, on=(OSError,)))) == Retry(1, on=(OSError,))
    for wrong in (
        {"times": -1},
        {"times": 1.5},
        {"times": True},
        {"times": 1, "crashes": -1},
        {"times": 1, "backoff": -1},
        {"times": 1, "backoff": math.nan},
        {"times": 1, "max_backoff": "60"},
        {"times": 1, "on": (5,)},
        {"times": 1, "on": KeyboardInterrupt},
    ):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            Retry(**wrong)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Retry(1).times = 2


# bind: where arguments go


@pytest.mark.parametrize(
    ("raw", "bound"),
    [
        (b'{"a":1,"b":3}', ((), {"a": 1, "b": 3})),
        (b'{"a":1}', ((), {"a": 1})),
        (b' \n{ "a" : 1 } ', ((), {"a": 1})),
        (b'{"\\u0061":1}', ((), {"a": 1})),
        (b'{"a":1,"a":2}', ((), {"a": 2})),
        (b"[1,3]", ((1, 3), {})),
        (b" [1]", ((1,), {})),
        (b"7", ((7,), {})),
        (b" 7 ", ((7,), {})),
    ],
)
@pytest.mark.parametrize("wrap", [bytes, memoryview, bytearray, msgspec.Raw])
def test_bind(raw, bound, wrap):
    assert add.bind(wrap(raw)) == bound


def test_nothing_and_null_are_no_arguments():
    @task
    def tick(a: int | None = 5) -> None: ...

    for raw in (None, b"", b"null", b" null ", b"{}", b"[]", memoryview(b"")):
        assert tick.bind(raw) == ((), {})
    assert tick.bind(b"[null]") == ((None,), {})


def test_positional_only_parameters_are_filled_by_name_too():
    @task
    def f(a: int, b: int = 2, c: int = 3, /, d: int = 4): ...

    assert f.bind(b'{"a":1}') == ((1,), {})
    assert f.bind(b'{"c":9,"a":1,"d":5}') == ((1, 2, 9), {"d": 5})
    assert f.bind(b"[1,2,3,4]") == ((1, 2, 3, 4), {})
    assert refusal(f, b'{"b":1}') == "task f: missing argument a"


def test_keyword_only_parameters():
    @task
    def f(a: int, *, k: str): ...

    assert f.bind(b'{"a":1,"k":"x"}') == ((), {"a": 1, "k": "x"})
    assert refusal(f, b"[1]") == "task f: missing argument k"
    assert refusal(f, b'[1,"x"]') == "task f: takes 1 positional argument, got 2"


def test_variable_parameters_are_typed():
    @task
    def f(a: str, *rest: int, **more: float): ...

    assert f.bind(b'["x",1,2]') == (("x", 1, 2), {})
    assert f.bind(b'{"a":"x","z":1.5}') == ((), {"a": "x", "z": 1.5})
    assert refusal(f, b'["x",1,"2"]') == "task f: argument rest[1]: expected int, got str"
    assert refusal(f, b'{"a":"x","z":"y"}') == "task f: argument z: expected float, got str"
    assert refusal(f, b'{"z":1}') == "task f: missing argument a"


def test_parameters_may_have_any_name():
    @task
    def f(self: int, f0: int, json: int, __struct_fields__: int = 0): ...

    raw = b'{"self":1,"f0":2,"json":3,"__struct_fields__":4}'
    assert f.bind(raw) == ((), {"self": 1, "f0": 2, "json": 3, "__struct_fields__": 4})


def test_rich_types_and_no_hints():
    @task
    def f(
        data: bytes, when: datetime.date, at: Point, tags: set[str], other, size: Annotated[int, 5] = 1
    ): ...

    raw = b'{"data":"aGk=","when":"2024-02-29","at":{"x":1},"tags":["a","a"],"other":[1,{"k":null}]}'
    assert f.bind(raw)[1] == {
        "data": b"hi",
        "when": datetime.date(2024, 2, 29),
        "at": Point(1),
        "tags": {"a"},
        "other": [1, {"k": None}],
    }


@pytest.mark.parametrize("hint", [Point, Point | None, Annotated[Point, msgspec.Meta(title="p")]])
def test_a_single_struct_takes_the_whole_object(hint):
    def f(p): ...

    f.__annotations__["p"] = hint
    item = task(f)
    assert item.bind(b'{"x":1,"y":2}') == ((), {"p": Point(1, 2)})
    assert item.bind(b'[{"x":1}]') == ((Point(1),), {})
    assert item.bind(b'{"p":{"x":1}}') == ((), {"p": Point(1)})
    assert refusal(item, b'{"y":2}').startswith("task f: argument p: object missing required field x")
    assert refusal(item, b'{"x":"1"}') == "task f: argument p.x: expected int, got str"
    assert refusal(item, b"null") == "task f: missing argument p"


def test_other_types_that_take_the_whole_object():
    @task
    def order(o: Order, /): ...

    @task
    def row(*, r: Row): ...

    @task
    def pet(p: Cat | Dog): ...

    assert order.bind(b'{"id":1,"at":{"x":1}}') == ((Order(1, Point(1)),), {})
    assert row.bind(b'{"name":"n"}') == ((), {"r": {"name": "n"}})
    assert pet.bind(b'{"type":"Dog","tricks":3}') == ((), {"p": Dog(3)})


def test_the_whole_object_wins_where_its_type_has_a_field_of_the_parameters_name():
    @task
    def f(name: Row): ...

    assert f.bind(b'{"name":"n"}') == ((), {"name": {"name": "n"}})


def test_two_parameters_or_a_plain_dict_go_by_name():
    @task
    def two(p: Point, n: int = 0): ...

    @task
    def loose(data: dict[str, int]): ...

    assert two.bind(b'{"p":{"x":1}}') == ((), {"p": Point(1)})
    assert loose.bind(b'{"data":{"x":1}}') == ((), {"data": {"x": 1}})
    assert refusal(loose, b'{"x":1}') == "task loose: unexpected argument x; it takes data"


def test_forward_references_resolve_late():
    assert late.bind(b'{"n":1}') == ((), {"item": Later(1)})


# bind: what is refused, and how that reads


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"{}", "task add: missing argument a"),
        (b"", "task add: missing argument a"),
        (b"[]", "task add: missing argument a"),
        (b'{"a":1,"c":2}', "task add: unexpected argument c; it takes a, b"),
        (b'{"A":1}', "task add: unexpected argument A; it takes a, b"),
        (b'{"a":"x"}', "task add: argument a: expected int, got str"),
        (b'{"a":1,"b":null}', "task add: argument b: expected int, got null"),
        (b'["x"]', "task add: argument a: expected int, got str"),
        (b'"x"', "task add: argument a: expected int, got str"),
        (b"true", "task add: argument a: expected int, got bool"),
        (b"[1,2,3]", "task add: takes 1 to 2 arguments, got 3"),
        (b'{"a":1e999}', "task add: argument a: number out of range"),
        (b'{"a":%s}' % (b"9" * 5000), "task add: argument a: integer value out of range"),
        (b'{"a\\n\\u001b[31m":1}', "task add: unexpected argument a\\n\\x1b[31m; it takes a, b"),
    ],
)
def test_refusals_name_task_parameter_and_fault(raw, text):
    assert refusal(add, raw) == text


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1',
        b'{"a":1}x',
        b'{"a":NaN}',
        b"{'a':1}",
        b"[1,]",
        b"nul",
        b"tru",
        b"\x00",
        b'{"\xff":1}',
        b'{"a":"\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"' + b"k" * 100_000 + b'":1}',
    ],
)
def test_malformed_arguments_are_refused(raw):
    assert refusal(add, raw).startswith("task add: ")


@pytest.mark.parametrize(
    "value",
    [
        b"1e999",
        b"-1e999",
        b"9" * 5000,
        b'"\\ud800"',
        b'"\\udc00x"',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"k":"\\ud800"}',
    ],
)
def test_values_that_python_cannot_hold_are_refused_without_hints_too(value):
    @task
    def f(a, *rest, **more): ...

    @task
    def g(a): ...

    for raw in (b'{"a":%s}' % value, b"[%s]" % value, b'{"a":1,"z":%s}' % value, b"[1,%s]" % value):
        assert refusal(f, raw).startswith("task f: ")
    for raw in (b'{"a":%s}' % value, b"[%s]" % value):
        assert refusal(g, raw).startswith("task g: ")


def test_constraints_nested_paths_and_the_hooks_of_the_users_own_types():
    @task
    def f(
        n: Annotated[int, msgspec.Meta(ge=0)] = 0,
        points: list[Point] = [],  # noqa: B006
        by_number: dict[int, int] = {},  # noqa: B006
        even: Even | None = None,
        data: bytes = b"",
    ): ...

    assert refusal(f, b'{"n":-1}') == "task f: argument n: expected int >= 0"
    assert (
        refusal(f, b'{"points":[{"x":1},{"x":"1"}]}') == "task f: argument points[1].x: expected int, got str"
    )
    assert "argument by_number" in refusal(f, b'{"by_number":{"x":1}}')
    assert refusal(f, b'{"even":{"n":1}}') == "task f: argument even: 'odd'"
    assert refusal(f, b'{"data":"?"}') == "task f: argument data: invalid base64 encoded string"


def test_no_parameters():
    @task
    def f(): ...

    assert f.bind(b"{}") == ((), {})
    assert refusal(f, b'{"a":1}') == "task f: unexpected argument a; it takes no arguments"
    assert refusal(f, b"[1]") == "task f: takes 0 arguments, got 1"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abkz"), inner, max_size=3),
    max_leaves=8,
)


@given(_json)
def test_the_fast_path_and_the_slow_path_agree(value):
    @task
    def f(a: int, b: str = "", *, k: Any = None): ...

    def outcome(bind: Any) -> Any:
        try:
            return bind(msgspec.json.encode(value))
        except BadArgs as error:
            return str(error)

    assert outcome(f.bind) == outcome(f.parameters._bind_one_by_one)


@given(st.binary(max_size=40))
def test_any_bytes_bind_or_are_bad_args(raw):
    for item in (add, late):
        try:
            item.bind(raw)
        except BadArgs as error:
            assert str(error).isprintable()


# encode_args


def test_encode_args_goes_by_name_where_it_can():
    assert add.encode_args((1,), {"b": 3}) == b'{"a":1,"b":3}'
    assert add.encode_args((1,), {}) == b'{"a":1}'

    @task
    def f(a: int, /, *rest: int, k: int = 0, **more: int): ...

    assert f.encode_args((1,), {"k": 2, "z": 3}) == b'{"a":1,"k":2,"z":3}'
    assert f.encode_args((1, 2, 3), {}) == b"[1,2,3]"
    for args, kwargs in (((1, 2), {"k": 3}), ((1, 2), {"z": 3}), ((1,), {"a": 2})):
        with pytest.raises(TypeError, match="task f"):
            f.encode_args(args, kwargs)


def test_encode_args_checks_like_python():
    for args, kwargs, text in (
        ((), {}, "missing a required argument: 'a'"),
        ((1, 2, 3), {}, "too many positional"),
        ((1,), {"a": 2}, "multiple values"),
        ((1,), {"c": 2}, "unexpected keyword"),
    ):
        with pytest.raises(TypeError, match=text):
            add.encode_args(args, kwargs)


def test_encode_args_names_the_parameter_that_json_cannot_express():
    for value, text in (
        (object(), "task add: argument b is of type object, which JSON cannot express"),
        ([1, math.nan], "task add: argument b[1] is nan, which JSON cannot express"),
        ("\ud800", "task add: argument b holds a lone surrogate, which UTF-8 cannot express"),
    ):
        with pytest.raises(TypeError) as caught:
            add.encode_args((1,), {"b": value})
        assert str(caught.value) == text


def test_what_a_task_encodes_it_binds():
    @task
    def whole(p: Point | None = None): ...

    @task
    def keyword(*, p: Point | None = None): ...

    @task
    def mixed(a: bytes, /, b: datetime.date, *, c: Order): ...

    for item in (whole, keyword):
        for value in (Point(1, 2), None):
            args, kwargs = item.bind(item.encode_args((), {"p": value}))
            assert [*args, *kwargs.values()] == [value]
        assert item.bind(item.encode_args((), {})) == ((), {})
    day = datetime.date(2024, 1, 1)
    raw = mixed.encode_args((b"\xff", day), {"c": Order(1)})
    assert mixed.bind(raw) == ((b"\xff",), {"b": day, "c": Order(1)})


# Results


def test_results_come_back_as_the_hint_says():
    @task
    def f() -> dict[str, Order]: ...

    @task
    def data() -> bytes: ...

    @task
    def bare(): ...

    @task
    def odd() -> pathlib.Path: ...

    @task
    def never() -> typing.NoReturn: ...

    assert f.decode_result(b'{"a":{"id":1,"at":{"x":2}}}') == {"a": Order(1, Point(2))}
    assert data.decode_result(encode_result(b"\xff", 100)) == b"\xff"
    for item in (bare, odd, never):
        assert item.decode_result(b'{"a":[1]}') == {"a": [1]}
        assert item.decode_result(None) is None
    with pytest.raises(TaskError, match="task add: the result is not what its hint says"):
        add.decode_result(b'"x"')


def test_encode_result():
    assert encode_result({"a": [1, None, "null", 2.5, b"hi"]}, 100) == b'{"a":[1,null,"null",2.5,"aGk="]}'
    assert encode_result(Order(1, Point(2)), 100) == b'{"id":1,"at":{"x":2,"y":0}}'
    assert encode_result(2**200, 100) == str(2**200).encode()


class Level(enum.Enum):
    LOW = math.nan


@dataclasses.dataclass
class Sample:
    MISSING: typing.ClassVar[float] = math.nan
    x: float
    note: str | None = None


class Answers:
    """Answers to any attribute, as a mock or a lazy proxy does."""

    def __getattr__(self, name: str) -> Any:
        return self


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "result is nan, which JSON cannot express"),
        ([0, 1, 2, {"x": math.nan}], "result[3].x is nan, which JSON cannot express"),
        ({"a b": (1.0, -math.inf)}, "result['a b'][1] is -inf, which JSON cannot express"),
        ({1: Point(math.inf)}, "result[1].x is inf, which JSON cannot express"),
        ([Sample(math.nan)], "result[0].x is nan, which JSON cannot express"),
        ({math.inf}, "result[0] is inf, which JSON cannot express"),
        ({"l": Level.LOW}, "result.l is nan, which JSON cannot express"),
        ([1, {"p": pathlib.Path("x")}], f"result[1].p is of type {pathlib.Path('x').__class__.__module__}."),
        (int, "result is of type type, which JSON cannot express"),
        ([1j], "result[0] is of type complex, which JSON cannot express"),
        (Answers(), f"result is of type {__name__}.Answers, which JSON cannot express"),
        ({"a": {(1, 2): 3}}, "result.a has the key (1, 2): it is of type tuple, which JSON cannot express"),
        (["\ud800"], "result[0] holds a lone surrogate"),
        ({"k": {"\ud800": 1}}, "result.k has the key '\\ud800': it holds a lone surrogate"),
        ([10**5000], "result[0] cannot be written as JSON: "),
        (_circle(), "result is nested too deeply, or holds itself"),
    ],
)
def test_what_json_cannot_express_is_refused_with_its_place(value, text):
    with pytest.raises(TypeError) as caught:
        encode_result(value, 10_000)
    assert str(caught.value).startswith(text)
    assert str(caught.value).isprintable()


def test_a_none_beside_finite_numbers_is_no_fault():
    assert encode_result([Sample(1.0), {"s": "null"}], 100) == b'[{"x":1.0,"note":null},{"s":"null"}]'


def test_a_result_beyond_the_limit():
    assert encode_result("xx", 4) == b'"xx"'
    with pytest.raises(TooLarge, match="5 bytes, more than the limit of 4"):
        encode_result("xxx", 4)


# schema


def test_schema():
    assert add.schema() == {
        "name": "add",
        "doc": "Adds two numbers.",
        "module": __name__,
        "args": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 2}},
            "required": ["a"],
            "additionalProperties": False,
        },
        "result": {"type": "integer"},
        "stream": None,
        "timeout": None,
        "soft_timeout": None,
        "priority": 0,
        "concurrency": None,
        "key": None,
        "isolated": False,
        "max_memory": None,
        "cancel_on_disconnect": False,
    }


def test_schema_of_anything_is_json():
    @task
    def whole(p: Point) -> Order: ...

    @task
    def odd(
        a, o: Order, n: float = math.nan, path: pathlib.Path = pathlib.Path(), *r: int, **k: int
    ) -> pathlib.Path: ...

    msgspec.json.encode([whole.schema(), odd.schema()])
    assert set(whole.schema()["args"]["$defs"]) == {"Point"}
    schema = odd.schema()
    assert schema["result"] == {}
    assert schema["doc"] == ""
    assert schema["args"]["properties"]["path"] == {}
    assert schema["args"]["properties"]["n"] == {"type": "number"}
    assert schema["args"]["required"] == ["a", "o"]
    assert schema["args"]["additionalProperties"] == {"type": "integer"}


def hinted(hint, *, is_async=False):
    def items():
        yield 1

    async def async_items():
        yield 1

    function = async_items if is_async else items
    function.__annotations__["return"] = hint
    return task(name="items")(function)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("hint", "items"),
    [
        (collections.abc.Iterator[int], {"type": "integer"}),
        (typing.Generator[list[str], None, None], {"type": "array", "items": {"type": "string"}}),
        (collections.abc.AsyncGenerator[int, None], {"type": "integer"}),
        (typing.AsyncIterator[str], {"type": "string"}),
        (typing.Annotated[collections.abc.Iterable[int], "as they come"], {"type": "integer"}),
        (collections.abc.Iterator[pathlib.Path], {}),
        (collections.abc.Iterator[bytes | int], None),
        (collections.abc.Iterator, {}),
        (typing.Any, {}),
        (list[int], {}),
    ],
)
def test_a_generator_streams_lines(hint, items, is_async):
    streaming = hinted(hint, is_async=is_async)
    assert streaming.streams and not streaming.is_coroutine
    assert streaming.stream_format == "lines"
    schema = streaming.schema()
    assert schema["stream"]["format"] == "lines" and schema["result"] == {"type": "null"}
    assert items is None or schema["stream"]["items"] == items
    msgspec.json.encode(schema)


@pytest.mark.parametrize(
    "hint", [bytes, bytearray, memoryview, bytes | memoryview, typing.Annotated[bytes, "gzip"]]
)
def test_a_generator_of_bytes_streams_bytes(hint):
    streaming = hinted(collections.abc.Iterator[hint])
    assert streaming.stream_format == "bytes"
    assert streaming.schema()["stream"] == {"format": "bytes"}


def test_a_generator_without_hints_streams_lines_and_stays_callable():
    @task
    def count(n):
        yield from range(n)

    assert count.stream_format == "lines"
    assert list(count(3)) == [0, 1, 2]
    assert not add.streams and add.stream_format is None


# Registry


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, with the import system put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or tmp_path).startswith(str(tmp_path)):
            del sys.modules[name]


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


TASK = "from workers.registry import task\n@task\ndef {0}(n: int) -> int:\n    return n\n"


def config_error(*names: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Registry.from_modules(names)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_registry_is_a_sorted_mapping():
    registry = Registry([renamed, add, add], modules=["m"])
    assert list(registry) == ["add", "renamed"]
    assert registry["add"] is add
    assert registry.get("nope") is None
    assert "renamed" in registry
    assert len(registry) == 2
    assert [schema["name"] for schema in registry.schemas()] == ["add", "renamed"]
    assert repr(registry) == "<Registry 2 tasks: add, renamed>"
    with pytest.raises(KeyError):
        registry["nope"]


def test_two_tasks_of_one_name_are_refused_with_both_places():
    other = task(name="add")(_plain)
    with pytest.raises(ConfigError) as caught:
        Registry([add, other])
    assert add.location in str(caught.value)
    assert other.location in str(caught.value)


def test_hints_that_json_cannot_satisfy_are_refused_at_start():
    @dataclasses.dataclass
    class Holder:
        lock: threading.Lock

    def f(p): ...

    for hint in (
        pathlib.Path,
        complex,
        list[pathlib.Path],
        dict[str, complex],
        Holder,
        str | bytes,
        "Nowhere",
    ):
        f.__annotations__["p"] = hint
        with pytest.raises(ConfigError, match=r"task f \(.*test_registry\.py:\d+\)") as caught:
            Registry([task(f)])
        assert str(caught.value).isprintable()
        assert "parameter p" in str(caught.value) or hint == "Nowhere"


def test_hints_that_some_json_satisfies_are_served():
    @task
    def f(a: object, b: typing.Iterable[int], c: typing.Hashable, own: threading.Event | None = None): ...

    Registry([f])
    assert f.bind(b'{"a":1,"b":[1],"c":"x"}') == ((), {"a": 1, "b": [1], "c": "x"})
    assert "expected" in refusal(f, b'{"a":1,"b":[1],"c":"x","own":1}')


def test_modules_and_files(folder):
    write(folder / "shop/__init__.py", "")
    write(folder / "shop/orders.py", TASK.format("order") + "alias = order\n")
    write(folder / "jobs/nightly_jobs.py", "from shop.orders import order\n" + TASK.format("nightly"))
    registry = Registry.from_modules(["shop.orders", "jobs/nightly_jobs.py", "shop.orders"])
    assert list(registry) == ["nightly", "order"]
    assert registry.modules == ("shop.orders", "nightly_jobs")
    assert registry.paths == (str(folder / "jobs"), str(folder))
    assert sys.path[:2] == list(registry.paths)
    assert registry["order"].location == "shop/orders.py:2"
    assert registry["nightly"].module == "nightly_jobs"
    assert pickle.loads(pickle.dumps(registry["nightly"])) is registry["nightly"]


def test_another_process_imports_the_same(folder, monkeypatch):
    write(folder / "a/one_task.py", TASK.format("one"))
    write(folder / "b/two_task.py", TASK.format("two"))
    first = Registry.from_modules(["a/one_task.py", "b/two_task.py"])
    monkeypatch.chdir("/")
    again = Registry.from_modules(first.modules, first.paths)
    assert dict(again) == dict(first)
    assert again.paths[:3] == first.paths


def test_a_missing_module_says_where_it_was_sought(folder):
    write(folder / "pkg_here/__init__.py", "")
    assert (
        config_error("no_such_mod") == f"there is no module no_such_mod; looked in {folder} and on sys.path"
    )
    assert config_error("pkg_here.tasks").startswith("there is no module pkg_here.tasks;")
    assert config_error("pkg_here/tasks").endswith("a file is named with its .py")
    assert config_error("nope.py") == f"there is no file {folder / 'nope.py'}"
    assert "no module was given" in config_error()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("x = 1\nraise ValueError('a\\nb')\n", "ValueError: a\\nb (bad_mod.py:2)"),
        ("\nimport no_such_lib\n", "ModuleNotFoundError: No module named 'no_such_lib' (bad_mod.py:2)"),
        ("import sys\n\nsys.exit(3)\n", "SystemExit: 3 (bad_mod.py:3)"),
        ("x = (\n", "SyntaxError: '(' was never closed (bad_mod.py:1)"),
        ("def f():\n    raise KeyError\n\nf()\n", "KeyError (bad_mod.py:2)"),
        ("import json\njson.loads('{')\n", "(bad_mod.py:2)"),
        ("import bad_mod_helper\n", "ZeroDivisionError: division by zero (bad_mod_helper.py:2)"),
        ("from workers.registry import task\n@task(timeout=-1)\ndef f(): ...\n", "not -1 (bad_mod.py:2)"),
    ],
)
def test_a_module_that_does_not_import_says_what_and_where(folder, body, text):
    write(folder / "bad_mod.py", body)
    write(folder / "bad_mod_helper.py", "\n1 / 0\n")
    for name in ("bad_mod", "bad_mod.py"):
        error = config_error(name)
        assert error.startswith("module bad_mod does not import: ")
        assert error.endswith(text)


def test_a_module_without_tasks(folder):
    write(folder / "empty_mod.py", "def f(): ...\n")
    assert config_error("empty_mod") == "module empty_mod has no tasks; decorate its functions with @task"


def test_files_of_one_stem_conflict(folder):
    write(folder / "a/same_stem.py", TASK.format("one"))
    write(folder / "b/same_stem.py", TASK.format("two"))
    write(folder / "json.py", TASK.format("three"))
    assert "already belongs to" in config_error("a/same_stem.py", "b/same_stem.py")
    assert "already belongs to" in config_error("json.py")


def test_partials_and_wrapped_functions_can_be_tasks():
    def logged(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    wrapped = task(logged(_plain))
    assert wrapped.bind(b'{"a":1}') == ((), {"a": 1})
    assert "expected int" in refusal(wrapped, b'{"a":"1"}')
    part = task(name="part")(functools.partial(add.function, b=5))
    assert part.bind(b'{"a":1}') == ((), {"a": 1})
    assert "expected int" in refusal(part, b'{"a":"1"}')
