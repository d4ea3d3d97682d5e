"""Room, Recent and Callers do what plain tables would, whatever comes."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from acomm.messages import Response
from acomm.room import MAX_HELD, PATIENCE, Room
from workers.callers import Callers
from workers.recent import JUST_NOW, Recent

UIDS = st.sampled_from([0, 1000, 1001])
OFTEN = settings(max_examples=60, stateful_step_count=40)


class RoomMachine(RuleBasedStateMachine):
    """Guests come, keep us waiting, and send messages that need room."""

    @initialize(most=st.integers(1, 5), share=st.sampled_from([1.0, 0.5, 0.3]))
    def begin(self, most: int, share: float) -> None:
        self.room: Room[int] = Room(most, 100, share)
        self.most, self.each = most, most if share == 1 else max(int(most * share), 1)
        self.each_unread = int(100 * share)
        self.now, self.count = 0.0, 0
        self.guests: dict[int, int] = {}
        self.waiting: dict[int, float] = {}  # in the order in which they began to
        self.reserved: dict[int, int] = {}
        self.held: dict[int, int] = {}

    def some(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from(sorted(self.guests))) if self.guests else None

    @rule(uid=UIDS)
    def enter(self, uid: int) -> None:
        self.count += 1
        self.room.enter(self.count, uid, self.now)
        self.guests[self.count] = uid
        self.waiting[self.count] = self.now

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if (guest := self.some(data)) is not None:
            self.room.forget(guest)
            self.held.pop(guest, None)
            if guest in self.reserved:
                self.free(guest)
            self.room.leave(guest)
            self.room.leave(guest)
            del self.guests[guest]
            self.waiting.pop(guest, None)

    @rule(data=st.data(), waits=st.booleans())
    def wait_or_move(self, data: st.DataObject, waits: bool) -> None:
        if (guest := self.some(data)) is not None:
            self.waiting.pop(guest, None)
            if waits:
                self.waiting[guest] = self.now
                self.room.waits(guest, self.now)
            else:
                self.room.moves(guest)

    @rule(seconds=st.sampled_from([0.1, PATIENCE, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data(), size=st.sampled_from([1, 30, 50, 99, 100, 101, 500]))
    def want(self, data: st.DataObject, size: int) -> None:
        guest = self.some(data)
        if guest is None or guest in self.reserved or guest in self.held:
            return
        fits = self.fits(self.guests[guest], size)
        assert self.room.reserve(self.guests[guest], size) is fits
        if fits:
            self.reserved[guest] = size
        elif self.room.hold(guest, self.guests[guest], size):
            self.held[guest] = size
        else:
            assert len(self.held) == MAX_HELD

    @rule(data=st.data())
    def come_whole(self, data: st.DataObject) -> None:
        if self.reserved:
            self.free(data.draw(st.sampled_from(sorted(self.reserved))))

    def free(self, guest: int) -> None:
        found = self.room.give_back(self.guests[guest], self.reserved.pop(guest))
        assert found == [held for held in self.held if held in found], "first come, first served"
        for other in found:
            self.reserved[other] = self.held.pop(other)

    def fits(self, uid: int, size: int) -> bool:
        used = sum(self.reserved.values())
        own = sum(size for guest, size in self.reserved.items() if self.guests[guest] == uid)
        return (not used or used + size <= 100) and (not own or own + size <= self.each_unread)

    @invariant()
    def it_counts_right(self) -> None:
        if not hasattr(self, "room"):
            return
        assert len(self.room) == len(self.guests)
        assert self.room.used == sum(self.reserved.values())
        assert self.room.used <= 100 or len(self.reserved) == 1
        for uid in (0, 1000, 1001):
            own = [size for guest, size in self.reserved.items() if self.guests[guest] == uid]
            assert sum(own) <= self.each_unread or len(own) == 1

    @invariant()
    def nobody_waits_for_room_that_there_is(self) -> None:
        if hasattr(self, "room"):
            assert not any(self.fits(self.guests[guest], size) for guest, size in self.held.items())

    @invariant()
    def who_goes_is_the_one_that_has_kept_us_waiting_for_longest(self) -> None:
        if not hasattr(self, "room"):
            return
        for uid in (0, 1000, 1001):
            own = [guest for guest, of in self.guests.items() if of == uid]
            too_many = len(own) > self.each < self.most
            assert (self.room.crowded(uid) is not None) is (too_many or len(self.guests) > self.most)
            among = {g: t for g, t in self.waiting.items() if len(own) <= self.each or g in own}
            longest = min(among.values(), default=self.now)
            slowest = self.room.slowest(uid, self.now)
            if slowest is None:
                assert self.now - longest <= PATIENCE
            else:
                assert among[slowest] == longest < self.now - PATIENCE


class RecentMachine(RuleBasedStateMachine):
    """Requests are accepted, answered, and asked for again."""

    IDS = st.sampled_from("abcdefgh")

    def __init__(self) -> None:
        super().__init__()
        self.recent = Recent(seconds=100.0, ids=4, max_bytes=30)
        self.now = 0.0
        self.flying: dict[str, bytes] = {}
        self.done: dict[str, tuple[bytes, float, Response, int]] = {}  # in the order of their answers
        self.inherited: dict[str, bytes] = {}
        self.inherited_at: float | None = None

    def forget(self) -> None:
        if self.inherited_at is not None and self.inherited_at < self.now - 100.0:
            self.inherited = {}
        while self.done:
            first = next(iter(self.done))
            size = sum(done[3] for done in self.done.values())
            if self.done[first][1] > self.now - 100.0 and len(self.done) <= 4 and size <= 30:
                return
            del self.done[first]

    def known(self, id: str) -> bytes | None:
        self.forget()
        done = self.done.get(id)
        return self.flying.get(id, self.inherited.get(id, done[0] if done else None))

    @rule(id=IDS, digest=st.binary(max_size=2))
    def accept(self, id: str, digest: bytes) -> None:
        known = self.known(id)
        assert self.recent.known(id, self.now) == known
        if known is None:
            self.recent.begin(id, digest)
            self.flying[id] = digest

    @rule(id=IDS, size=st.sampled_from([0, 5, 12, 40]))
    def answer(self, id: str, size: int) -> None:
        response = Response(id, msgspec.Raw(b"1" * size))
        self.recent.finish(response, self.now)
        if id in self.flying:
            self.done[id] = self.flying.pop(id), self.now, response, size + 1
            self.forget()

    @rule(seconds=st.sampled_from([1.0, JUST_NOW, 60.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(ids=st.lists(IDS, max_size=3))
    def inherit(self, ids: list[str]) -> None:
        mine = [(id, b"i") for id in ids if self.known(id) is None]
        self.recent.inherit(mine)
        self.inherited.update(mine)
        self.inherited_at = None

    @rule(done=st.booleans())
    def inheritance_ends(self, done: bool) -> None:
        self.recent.inheritance_ended(self.now, done=done)
        self.inherited_at = self.now
        if not done:
            self.inherited = {}

    @invariant()
    def it_says_what_the_tables_say(self) -> None:
        for id in "abcdefgh":
            known = self.known(id)
            assert self.recent.known(id, self.now) == known
            done = self.done.get(id)
            assert self.recent.answer(id) is (done[2] if done else None)
            lately = id in self.inherited and (
                self.inherited_at is None or self.inherited_at > self.now - JUST_NOW
            )
            told = done is not None and done[1] > self.now - JUST_NOW
            assert self.recent.expected(id, self.now) == (id in self.flying or told or lately)
        assert len(self.recent) == len(self.flying) + len(self.done)
        assert self.recent._bytes == sum(done[3] for done in self.done.values()) <= 30
        assert dict(self.recent.export()) == {
            **self.inherited, **{id: done[0] for id, done in self.done.items()}, **self.flying
        }  # fmt: skip


class CallersMachine(RuleBasedStateMachine):
    """Connections wait for calls, and leave."""

    IDS = st.sampled_from("abc")
    WHO = st.sampled_from([1, 2, 3])

    def __init__(self) -> None:
        super().__init__()
        self.callers = Callers()
        self.pairs: set[tuple[str, Any]] = set()

    @rule(id=IDS, who=WHO)
    def add(self, id: str, who: int) -> None:
        self.callers.add(id, who)
        self.pairs.add((id, who))

    @rule(id=IDS)
    def ended(self, id: str) -> None:
        self.callers.ended(id)
        self.pairs = {pair for pair in self.pairs if pair[0] != id}

    @rule(who=WHO)
    def left(self, who: int) -> None:
        before = {id for id, _ in self.pairs}
        self.pairs = {pair for pair in self.pairs if pair[1] != who}
        assert sorted(self.callers.left(who)) == sorted(before - {id for id, _ in self.pairs})

    @invariant()
    def nothing_stays_behind(self) -> None:
        assert len(self.callers) == len({id for id, _ in self.pairs})
        assert {(id, who) for id, all in self.callers.waiting.items() for who in all} == self.pairs
        assert set(self.callers._calls) == {who for _, who in self.pairs}


class TestRoom(RoomMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = OFTEN


class TestRecent(RecentMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = OFTEN


class TestCallers(CallersMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = OFTEN
