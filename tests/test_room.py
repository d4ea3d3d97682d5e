"""Who may be in, how much may be unfinished, and what the descriptors allow: all of it pure."""

from __future__ import annotations

import pytest

from acomm.room import MAX_HELD, PATIENCE, Room
from workers import descriptors
from workers.errors import ConfigError

LATER = PATIENCE + 0.1


def room_of(*guests: str, most: int = 2, uid: int = 1, share: float = 1.0) -> Room[str]:
    room = Room[str](most, share=share)
    for number, guest in enumerate(guests):
        room.enter(guest, uid, number / 1000)
    return room


class TestGuests:
    def test_there_are_no_more_than_so_many(self) -> None:
        room = room_of("a", "b")
        assert room.crowded(1) is None
        room.enter("c", 1, 0.0)
        assert room.crowded(1) == "there are 2 connections, and more are not taken"
        room.leave("a")
        assert room.crowded(1) is None
        room.leave("a")
        assert len(room) == 2, "who has left leaves once"

    def test_who_has_kept_us_waiting_for_longest_goes(self) -> None:
        room = room_of("a", "b", "c")
        assert room.slowest(1, LATER) == "a"
        room.moves("a")
        assert room.slowest(1, LATER) == "b"
        room.waits("b", LATER)
        assert room.slowest(1, LATER) == "c"

    def test_nobody_goes_for_a_moments_silence(self) -> None:
        room = room_of("a", "b", "c")
        assert room.slowest(1, PATIENCE) is None
        for guest in "abc":
            room.moves(guest)
        assert room.slowest(1, 1000.0) is None, "it is not for them to move"

    def test_who_has_more_than_his_share_goes_for_himself(self) -> None:
        room = room_of("a", "b", most=4, share=0.5)
        room.enter("other", 2, -1.0)
        room.enter("c", 1, 0.1)
        assert room.crowded(1) == "uid 1 has 2 connections, and more are not taken of one"
        assert room.crowded(2) is None
        assert room.slowest(1, LATER) == "a", "the other has been waiting for longer, and has no part in it"

    def test_a_share_of_few_is_one(self) -> None:
        assert room_of("a", most=1, share=0.5).crowded(1) is None

    def test_the_longest_wait_counts_among_all_uids(self) -> None:
        room = room_of("a", most=2)
        room.enter("b", 2, -1.0)
        room.enter("c", 3, 0.0)
        assert room.slowest(3, LATER) == "b"

    def test_what_is_not_in_is_not_waited_for(self) -> None:
        room = room_of()
        room.waits("a", 0.0)
        room.moves("a")
        assert room.slowest(1, LATER) is None


class TestUnfinishedMessages:
    def test_there_are_so_many_bytes(self) -> None:
        room = Room[str](unread=100)
        assert room.reserve(1, 60)
        assert not room.reserve(2, 41)
        assert room.reserve(2, 40)
        assert room.stats()["unread_bytes"] == 100
        assert room.give_back(1, 60) == []
        assert room.reserve(2, 41)

    def test_one_uid_has_no_more_than_its_share(self) -> None:
        room = Room[str](unread=100, share=0.5)
        assert room.reserve(1, 30)
        assert not room.reserve(1, 30)
        assert room.reserve(2, 30)

    def test_one_alone_always_has_room(self) -> None:
        room = Room[str](unread=100, share=0.5)
        assert room.reserve(1, 90)
        assert not room.reserve(2, 90)

    def test_who_waits_has_it_in_the_order_of_coming(self) -> None:
        room = Room[str](unread=100)
        assert room.reserve(1, 100)
        for guest in "abc":
            assert room.hold(guest, 1, 50)
        room.forget("a")
        assert room.give_back(1, 100) == ["b", "c"]
        assert room.stats()["unread_bytes"] == 100

    def test_only_so_many_wait(self) -> None:
        room = Room[int](unread=1)
        assert all(room.hold(guest, 1, 1) for guest in range(MAX_HELD))
        assert not room.hold(-1, 1, 1)

    def test_nothing_is_remembered_of_who_had_no_room(self) -> None:
        room = Room[str](unread=100)
        assert room.reserve(1, 100)
        assert not room.reserve(2, 1)
        assert room.give_back(1, 100) == []
        assert not room._unread


class TestDescriptors:
    def test_as_many_as_wanted_where_there_are_enough(self) -> None:
        assert descriptors.connections(10_000, 1_048_576, workers=4) == 10_000

    def test_each_connection_counts_twice_and_the_rest_is_left_free(self) -> None:
        assert descriptors.connections(10_000, 1024, workers=2) == (1024 - 64 - 16) // 2
        assert descriptors.connections(10_000, 4096, workers=2, others=1024) == (4096 - 64 - 16 - 1024) // 2

    def test_too_few_are_refused_and_the_fewest_are_enough(self) -> None:
        with pytest.raises(ConfigError, match=r"only 81 .* too few for 2 workers: 82 are the fewest"):
            descriptors.connections(1, 81, workers=2)
        assert descriptors.connections(10, 82, workers=2) == 1
