"""Segments: what is stored is what is read, for as long as somebody looks; memory is used again."""

import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from workers import segments
from workers.segments import ALIGNMENT, IDLE, MAPPED, Arena, Place, Reader, Segment, layout, new_file

LIMIT = 1 << 24
MAPS = MAPPED + 1000
"""Bytes that are mapped, not copied."""

Making = Callable[..., Reader]


class Channel:
    """Both sides of one file."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.fd = new_file()
        self.arena = Arena(os.dup(self.fd), limit, 1)

    def store(self, *parts: bytes) -> tuple[Segment, Place]:
        found = self.arena.store([[part] for part in parts])
        assert found is not None
        return found

    def reader(self, number: int = 5, *, private: bool = True) -> Reader:
        return Reader(self.fd, number, private=private)

    def memory(self) -> int:
        """Bytes that the kernel has for the segments."""
        return os.fstat(self.fd).st_blocks * 512 - 4096  # the ledger's one page


@pytest.fixture
def channel() -> Iterator[Channel]:
    channel = Channel()
    yield channel
    channel.arena.close()
    os.close(channel.fd)


def test_parts_are_aligned() -> None:
    assert layout([1, ALIGNMENT, 3]) == ([0, ALIGNMENT, 2 * ALIGNMENT], 2 * ALIGNMENT + 3)
    assert layout([5]) == ([0], 5)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("size", [10, MAPS])
def test_what_is_stored_is_read(channel: Channel, size: int, private: bool) -> None:
    parts = [os.urandom(size), b"abc", os.urandom(7)]
    views = channel.reader(private=private).open(channel.store(*parts)[1])
    assert [bytes(view) for view in views] == parts
    assert not any(view.readonly for view in views)


def test_a_part_of_many_pieces(channel: Channel) -> None:
    pieces = [os.urandom(random.randrange(2000)) for _ in range(3000)]
    found = channel.arena.store([[b"first"], pieces])
    assert found is not None
    assert bytes(channel.reader().open(found[1])[1]) == b"".join(pieces)


def test_a_segment_is_used_again_when_both_sides_are_done_with_it(channel: Channel) -> None:
    reader = channel.reader()
    segment, place = channel.store(bytes(MAPS))
    views = reader.open(place)
    part = memoryview(views[0][5:10])
    channel.arena.end(segment)
    del views
    assert channel.store(bytes(MAPS))[1].offset != place.offset
    assert bytes(part) == bytes(5)
    del part
    assert channel.store(b"x" * MAPS)[1].offset == place.offset
    assert channel.arena.used == 2 * MAPS


def test_what_is_not_ended_stays_as_it_is(channel: Channel) -> None:
    """A call that is sent again, to another worker."""
    segment, place = channel.store(b"x" * MAPS)
    for number in 5, 6:
        view = channel.reader(number).open(place)[0]
        assert view[7] == ord("x")
        view[7] = 0  # its own copy
        del view
        assert channel.store(bytes(MAPS))[1].offset != place.offset
    channel.arena.end(segment)
    assert channel.store(bytes(MAPS))[1].offset == place.offset


def test_a_reader_that_is_not_private_writes_to_the_segment(channel: Channel) -> None:
    _, place = channel.store(bytes(MAPS))
    view = channel.reader(private=False).open(place)[0]
    view[3] = 7
    assert channel.reader().open(place)[0][3] == 7


def test_lent_is_out_until_it_is_given_back(channel: Channel) -> None:
    segment, place = channel.store(bytes(10))
    channel.arena.lend(segment)
    assert channel.store(bytes(10))[1].offset != place.offset
    channel.reader().give_back(place.index)
    assert channel.store(bytes(10))[1].offset == place.offset


def test_what_a_dead_reader_held_is_freed_and_not_used_again(channel: Channel) -> None:
    segment, place = channel.store(b"x" * MAPS)
    other, elsewhere = channel.store(b"x" * MAPS)
    views = [channel.reader(5).open(place)[0], channel.reader(6).open(elsewhere)[0]]
    channel.arena.end(segment)
    channel.arena.mourn(5)
    third, again = channel.store(b"y" * MAPS)
    assert again.offset not in (place.offset, elsewhere.offset)
    assert views[0][5] == 0, "whoever still looks sees nothing of others"
    assert bytes(views[1]) == b"x" * MAPS
    channel.arena.end(other)
    channel.arena.end(third)
    assert channel.arena.used == 2 * MAPS


def test_a_call_survives_its_reader(channel: Channel) -> None:
    segment, place = channel.store(b"x" * MAPS)
    lost = channel.reader(5).open(place)
    channel.arena.mourn(5)
    assert bytes(channel.reader(6).open(place)[0]) == b"x" * MAPS
    del lost
    channel.arena.end(segment)
    assert channel.store(bytes(MAPS))[1].offset != place.offset


def test_the_limit(channel: Channel) -> None:
    assert channel.arena.store([[bytes(LIMIT + 1)]]) is None
    large, _ = channel.store(bytes(LIMIT))
    assert channel.arena.store([[b"x"]]) is None
    channel.arena.end(large)
    channel.store(b"x")  # of another size: the free one makes room
    assert channel.memory() <= 4096
    assert channel.arena.used == 1


def test_a_free_segment_that_grows_counts_what_is_new(channel: Channel) -> None:
    half = LIMIT // 2
    segment, place = channel.store(bytes(half // 2 + 1))
    channel.arena.end(segment)
    segment, again = channel.store(bytes(half))
    assert again.offset == place.offset
    assert channel.arena.used == half
    channel.store(bytes(half))
    assert channel.arena.store([[b"x"]]) is None


def test_the_numbers_run_out(channel: Channel) -> None:
    found = [channel.store(b"x") for _ in range(segments._SEGMENTS)]
    assert channel.arena.store([[b"x"]]) is None
    channel.arena.end(found[3][0])
    assert channel.store(b"x")[1].index == found[3][1].index


def test_idle_memory_is_freed(channel: Channel) -> None:
    arena = channel.arena
    assert arena.due is None
    segment, place = channel.store(b"x" * MAPS)
    view = channel.reader().open(place)[0]
    assert arena.due is not None
    now = arena.due
    arena.end(segment)
    arena.trim(now)
    assert bytes(view) == b"x" * MAPS
    assert arena.due == now + IDLE
    del view
    arena.trim(now + 1)
    assert channel.memory() >= MAPS, "it has been free for no time"
    arena.trim(now + 1 + IDLE)
    assert channel.memory() == arena.used == 0
    assert arena.due is None


def test_whoever_trims_is_told_that_there_is_something() -> None:
    told: list[bool] = []
    arena = Arena(new_file(), LIMIT, 1, lambda: told.append(True))
    for _ in range(2):
        assert arena.store([[b"x"]])
    assert told == [True]
    arena.close()


def test_no_room_in_the_file_system_is_no_error(channel: Channel) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert channel.arena.store([[bytes(1 << 21)]]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert channel.arena.used == channel.memory() == 0


def test_an_interrupted_store_leaves_nothing(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(segments, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        channel.arena.store([[bytes(MAPS)]])
    assert channel.arena.used == 0
    assert "0 busy" in repr(channel.arena)


def test_what_cannot_be_mapped_is_copied(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(MAPS)
    segment, place = channel.store(data)
    reader = channel.reader()
    monkeypatch.setattr(segments, "_map", lambda *_: (_ for _ in ()).throw(OSError))
    view = reader.open(place)[0]
    assert view == data
    channel.arena.end(segment)
    assert channel.store(bytes(MAPS))[1].offset == place.offset, "a copy holds nothing"
    assert view == data


def test_there_are_so_many_mappings_at_most(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MOST_MAPPED", len(segments._mappings) + 1)
    found = [channel.store(bytes(MAPS)) for _ in range(2)]
    views = [channel.reader().open(place) for _, place in found]
    for segment, _ in found:
        channel.arena.end(segment)
    offsets = [channel.store(bytes(MAPS))[1].offset for _ in range(2)]
    assert found[0][1].offset not in offsets
    assert found[1][1].offset in offsets
    del views


def in_a_fork(function: Callable[[], object]) -> int:
    """The exit status of a fork that calls it."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_neither_stores_nor_gives_back(channel: Channel) -> None:
    segment, place = channel.store(b"x" * MAPS)
    views = channel.reader().open(place)
    channel.arena.end(segment)
    assert in_a_fork(lambda: channel.arena.store([[b"x"]]) is None) == 0
    assert in_a_fork(lambda: views.clear() is None) == 0
    assert channel.store(bytes(MAPS))[1].offset != place.offset
    assert bytes(views[0]) == b"x" * MAPS


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_what_a_fork_sees_too_is_not_used_again(channel: Channel) -> None:
    reader = channel.reader()
    segment, place = channel.store(b"x" * MAPS)
    views = reader.open(place)
    channel.arena.end(segment)
    go, went = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(go, 1)
        os._exit(0 if bytes(views[0]) == b"x" * MAPS else 1)
    views.clear()
    for _ in range(3):
        found, other = channel.store(b"y" * MAPS)
        assert other.offset != place.offset
        channel.arena.end(found)
    channel.arena.trim(1e12)
    os.write(went, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(go)
    os.close(went)
    # What comes after is as before.
    segment, place = channel.store(bytes(MAPS))
    views = reader.open(place)
    channel.arena.end(segment)
    del views
    assert channel.store(bytes(MAPS))[1].offset == place.offset


def test_views_outlive_the_arena_the_reader_and_the_file() -> None:
    channel = Channel()
    data = os.urandom(MAPS)
    view = channel.reader().open(channel.store(data)[1])[0]
    channel.arena.close()
    channel.arena.close()
    assert channel.arena.store([[b"x"]]) is None
    channel.arena.trim(1e12)
    os.close(channel.fd)
    del channel
    assert bytes(view) == data


def test_no_descriptor_is_left() -> None:
    before = os.listdir("/proc/self/fd")
    channel = Channel()
    views = [channel.reader().open(channel.store(bytes(MAPS))[1]) for _ in range(10)]
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2, "views have none of their own"
    channel.arena.close()
    os.close(channel.fd)
    del views
    Arena(new_file(), LIMIT, 1)  # forgotten, not closed
    assert os.listdir("/proc/self/fd") == before


def test_a_close_waits_for_whoever_stores(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor's number may be another file's a moment later."""
    write = segments._write
    writing, closed = threading.Event(), threading.Event()
    stored: list[object] = []

    def slow(*args: Any) -> None:
        writing.set()
        assert closed.wait(60)
        write(*args)

    monkeypatch.setattr(segments, "_write", slow)
    thread = threading.Thread(target=lambda: stored.append(channel.arena.store([[b"x"]])))
    thread.start()
    assert writing.wait(60)
    channel.arena.close()
    os.fstat(channel.arena.fd)
    closed.set()
    thread.join(60)
    assert stored
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(channel.arena.fd)


@pytest.mark.parametrize("seed", range(8))
def test_nobody_ever_sees_what_is_for_another(seed: int) -> None:
    """Any order of storing, opening, dropping, ending, dying and trimming."""
    rng = random.Random(seed)
    channel = Channel(limit=20 * MAPS)
    readers = {number: channel.reader(number) for number in range(2, 6)}
    fresh = 100
    now = 0.0
    calls: list[tuple[Segment, Place, bytes]] = []
    held: list[tuple[int, Place, list[memoryview[int]], bytes]] = []
    dead: list[object] = []  # a dead process gives nothing back
    refused = 0
    for step in range(600):
        match rng.randrange(7):
            case 0 | 1:
                size = rng.choice([500, MAPS, MAPS + 70_000])
                data = step.to_bytes(4, "big") * (size // 4)
                found = channel.arena.store([[data]])
                if found is None:
                    refused += 1
                else:
                    calls.append((*found, data))
            case 2 if calls:
                _, place, data = rng.choice(calls)
                number = rng.choice(list(readers))
                if not any(place is other for _, other, _, _ in held):  # one worker has it at a time
                    held.append((number, place, readers[number].open(place), data))
            case 3 if held:
                held.pop(rng.randrange(len(held)))
            case 4 if calls:
                segment, _, _ = calls.pop(rng.randrange(len(calls)))
                channel.arena.end(segment)
            case 5 if rng.random() < 0.2:
                victim = rng.choice(list(readers))
                dead += [readers.pop(victim), *(entry for entry in held if entry[0] == victim)]
                held = [entry for entry in held if entry[0] != victim]
                channel.arena.mourn(victim)
                fresh += 1
                readers[fresh] = channel.reader(fresh)
            case 6 if rng.random() < 0.3:
                now += IDLE
                channel.arena.trim(1e9 + now)
        assert all(bytes(view) == data for _, _, views, data in held for view in views)
        assert channel.memory() <= channel.arena.limit + 64 * 4096
    assert 0 < refused < 300
    held.clear()
    for segment, _, _ in calls:
        channel.arena.end(segment)
    channel.arena.trim(1e12)
    channel.arena.trim(2e12)
    assert channel.arena.used == channel.memory() == 0
    channel.arena.close()
    os.close(channel.fd)
