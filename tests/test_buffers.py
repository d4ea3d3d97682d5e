"""Pickles with large parts in shared memory: the value that comes out is the one that went in, uncopied."""

import datetime
import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from workers import buffers, pickling
from workers.buffers import LARGE, Stored
from workers.pickling import Functions, Loader, dump_result, outcome
from workers.segments import MAPPED, Arena, Reader, new_file

LIMIT = 1 << 26
BIG = MAPPED + 8


class Ways:
    """From a program to a worker, and back."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.calls, self.results = new_file(), new_file()
        self.out = Arena(os.dup(self.calls), limit, 1)
        self.back = Arena(os.dup(self.results), limit, 7)
        self.loader = Loader(Reader(self.calls, 7, private=True))
        self.reader = Reader(self.results, 7, private=False)
        self.functions = Functions()
        self.stored = 0

    def call(self, function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        data = self.functions.prepare(function).call(args, kwargs, self.out)
        if isinstance(data, Stored):
            self.stored += 1
            self.out.end(data.segment)
            assert len(data.data) < 2 * LARGE
            data = data.data
        return self.loader.call(data)

    def result(self, value: Any, arena: Arena | None = None) -> Any:
        data = dump_result(value, 1 << 31, arena or self.back)
        self.stored += data.startswith(b"@")
        result, error = outcome(data, lambda place: self.reader)
        assert error is None
        return result

    def close(self) -> None:
        self.out.close()
        self.back.close()
        os.close(self.calls)
        os.close(self.results)


@pytest.fixture
def ways() -> Iterator[Ways]:
    ways = Ways()
    yield ways
    ways.close()


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, pd.DataFrame | pa.Table):
        return bool(a.equals(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


ARRAY = np.arange(BIG // 8, dtype=np.float64)

LARGE_VALUES = {
    "array": ARRAY,
    "two-dimensional": ARRAY[: BIG // 16 * 2].reshape(2, -1),
    "Fortran's order": np.asfortranarray(ARRAY[: BIG // 16 * 2].reshape(2, -1)),
    "not contiguous": np.arange(BIG)[::2],
    "structured": np.zeros(BIG // 8, dtype=[("a", "<i4"), ("b", "<f4")]),
    "strings": np.array(["häuser"] * (BIG // 24)),
    "objects": np.array([str(n) for n in range(LARGE)], dtype=object),
    "masked": np.ma.masked_array(ARRAY, ARRAY > 5).data,
    "arrays of all sizes": [ARRAY, np.arange(3), ARRAY[:5], np.arange(LARGE), np.array([])],
    "the same one twice": [ARRAY] * 2,
    "frame": pd.DataFrame({"a": ARRAY, "b": np.arange(len(ARRAY)), "c": ["x"] * len(ARRAY)}),
    "table": pa.table({"a": pa.array(ARRAY), "b": pa.array([str(n) for n in range(len(ARRAY))])}),
    "bytes": os.urandom(BIG),
    "bytearray": bytearray(os.urandom(BIG)),
    "text": "ä€" * BIG,
    "nested bytes": {"a": [b"x" * BIG, (b"y" * BIG, "z" * LARGE)], "b": bytearray(BIG)},
    "many small": list(range(BIG)),
    "a large number": 1 << (8 * BIG),
    "memoryview": memoryview(os.urandom(BIG)),
    "memoryviews": [memoryview(bytearray(BIG)), memoryview(b"abc")],
    "bytes that look like a frame": b"\x95" + bytes(BIG),
    "bytes that name __main__": b"__main__" * BIG,
}

SMALL_VALUES = [
    None, 3, "x", b"x" * 1000, bytearray(10), np.arange(10), np.array(3.5), memoryview(b"abc"),
    datetime.date(2026, 1, 2), {"a": [1, (2, 3)]}, pd.DataFrame({"a": [1]}), pa.table({"a": [1]}),
]  # fmt: skip


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@pytest.mark.parametrize("value", LARGE_VALUES.values(), ids=list(LARGE_VALUES))
def test_large_values_arrive(ways: Ways, value: Any) -> None:
    for _ in range(3):  # the first call of a function and the next ones go different ways
        function, args, kwargs = ways.call(echo, value, other=value)
        assert function is echo
        assert same(args, (value,))
        assert same(kwargs, {"other": value})
    assert same(ways.result(value), value)
    assert ways.stored == 4


@pytest.mark.parametrize("value", SMALL_VALUES, ids=lambda value: type(value).__name__)
def test_small_values_do_not_go_there(ways: Ways, value: Any) -> None:
    assert same(ways.call(echo, value)[1], (value,))
    assert same(ways.result(value), value)
    assert same(ways.result([value] * 3), [value] * 3)
    assert ways.stored == 0
    assert ways.out.used == ways.back.used == 0


def test_calls_that_are_large_and_small_by_turns(ways: Ways) -> None:
    for n in (3, BIG, 3, 3, BIG, BIG, 3):
        value = os.urandom(n)
        assert ways.call(echo, value)[1] == (value,)
    assert ways.stored == 3


def test_functions_with_a_state_and_functions_by_value(ways: Ways) -> None:
    n = 3
    function, args, _ = ways.call([ARRAY].count, 1)
    assert np.array_equal(function.__self__[0], ARRAY)
    function, args, _ = ways.call(lambda value: len(value) + n, ARRAY)
    assert function(*args) == len(ARRAY) + 3
    assert ways.stored == 2


def base(array: Any) -> Any:
    """What an array looks at in the end."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def test_arrays_frames_and_tables_are_not_copied(ways: Ways) -> None:
    frame = pd.DataFrame({"a": ARRAY, "b": ARRAY})
    table = pa.table({"a": pa.array(ARRAY)})
    for array, other, arrow in (ways.call(echo, ARRAY, frame, table)[1], ways.result((ARRAY, frame, table))):
        assert isinstance(base(array), memoryview)
        assert isinstance(base(other["a"].to_numpy()), memoryview)
        start = array.__array_interface__["data"][0]
        place = arrow["a"].chunk(0).buffers()[1].address
        assert 0 <= place - start < 4 * ARRAY.nbytes + LARGE, "in the same segment"
        assert start % 64 == place % 64 == 0


def test_what_could_be_written_to_can_be(ways: Ways) -> None:
    array = ARRAY.copy()
    fixed = ARRAY.copy()
    fixed.flags.writeable = False
    for there, kept in (ways.call(echo, array, fixed)[1], ways.result((array, fixed))):
        there += 1
        assert np.array_equal(there, array + 1)
        assert not kept.flags.writeable
    assert ways.result(memoryview(bytes(BIG))).readonly
    assert not ways.result(memoryview(bytearray(BIG))).readonly
    assert ways.result(memoryview(b"x")).readonly
    assert not ways.result(memoryview(bytearray(1))).readonly
    assert not ways.result(memoryview(bytearray(8))[::2]).readonly
    assert ways.result(memoryview(bytes(8))[::2]).readonly


@pytest.mark.parametrize("length", [6, 6 * LARGE])
@pytest.mark.parametrize("format", "bBhHiIlLqQfd")
def test_memoryviews_keep_format_and_shape(ways: Ways, format: str, length: int) -> None:
    flat = memoryview(bytearray(os.urandom(length * 8))).cast(format)  # type: ignore[call-overload]
    for view in (flat, flat.cast("B").cast(format, (2, len(flat) // 2)), flat[::2], flat[:0]):
        for there in (ways.call(echo, view)[1][0], ways.result(view)):
            assert (there.format, there.nbytes) == (format, view.nbytes)
            assert there.tobytes() == view.tobytes()
            assert there.shape == view.shape
    with pytest.raises(pickle.PicklingError, match=r"a memoryview of the format 'T\{"):
        ways.call(echo, memoryview(LARGE_VALUES["structured"]))


def test_what_cannot_be_pickled_is_refused_in_pickles_words(ways: Ways) -> None:
    lock = threading.Lock()
    for value in (lock, (ARRAY, lock), [bytes(BIG), lock]):
        for _ in range(2):
            with pytest.raises(TypeError, match=r"cannot pickle '_thread.lock' object"):
                ways.call(echo, value)
        with pytest.raises(TypeError, match=r"cannot pickle '_thread.lock' object"):
            ways.result(value)
    with pytest.raises(pickle.PicklingError, match="non-contiguous"):
        ways.result(pickle.PickleBuffer(memoryview(bytes(BIG))[::2]))
    assert ways.out.used == ways.back.used == 0


def test_what_finds_no_room_goes_as_before() -> None:
    ways = Ways(limit=LARGE)
    for value in (ARRAY, bytes(BIG), [bytes(BIG), ARRAY], list(range(BIG)), memoryview(bytes(BIG))):
        for _ in range(2):
            assert same(ways.call(echo, value)[1], (value,))
        assert same(ways.result(value), value)
    assert ways.stored == 0
    ways.close()


def test_without_shared_memory() -> None:
    functions, loader = Functions(), Loader()
    for value in (ARRAY, bytes(BIG), memoryview(bytearray(BIG)), 3):
        data = functions.prepare(echo).call((value,), {}, None)
        assert isinstance(data, bytes)
        assert same(loader.call(data)[1], (value,))
        answer = dump_result(value, 1 << 31, None)
        assert same(pickle.loads(answer), value)


def test_results_over_the_limit_of_a_message() -> None:
    ways = Ways()
    with pytest.raises(pickling.TooLarge):
        dump_result(ARRAY, LARGE, None)
    assert same(outcome(dump_result(ARRAY, LARGE, ways.back), lambda place: ways.reader)[0], ARRAY)
    ways.close()


def test_a_stream_refers_to_main_where_pickle_says_so() -> None:
    """Values that happen to contain the word are not looked through if they are long."""
    pickled = buffers.dump([b"__main__" * LARGE, "__main__" * LARGE, bytearray(b"__main__" * LARGE)])
    assert not pickled.names_main
    value = [1 << (8 * LARGE), b"x" * LARGE, *range(LARGE), "__main__"]
    assert buffers.dump(value).names_main
    assert buffers.dump([*range(LARGE), "__main__", *range(LARGE)]).names_main
    for n in range(0, 70000, 7001):  # wherever the frames end
        assert buffers.dump([b"x" * n, b"y" * 30000, "__main__", b"x" * LARGE]).names_main


def test_memory_is_used_again(ways: Ways) -> None:
    for _ in range(20):
        ways.call(echo, ARRAY)
        ways.result(ARRAY)
    assert ways.out.used < 2 * BIG
    assert ways.back.used < 2 * BIG
    kept = [ways.result(ARRAY + n) for n in range(20)]
    assert ways.back.used > 20 * ARRAY.nbytes
    assert all(np.array_equal(array, ARRAY + n) for n, array in enumerate(kept))


def test_a_value_that_fails_to_load_gives_its_memory_back(ways: Ways) -> None:
    value = [Fails(), ARRAY]
    for _ in range(5):
        result, error = outcome(dump_result(value, 1 << 31, ways.back), lambda place: ways.reader)
        assert result is None
        assert isinstance(error, ZeroDivisionError)
        del error
    assert ways.back.used < 2 * BIG


class Fails:
    def __reduce__(self) -> Any:
        return divmod, (1, 0)
