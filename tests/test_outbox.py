"""The outbox: what waits for a hook, and who goes next; no I/O and no clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from acomm.errors import ConnectionLost
from acomm.outbox import Outbox
from acomm.parcel import OVERHEAD, Dead, Fault, Parcel, Why

LOST = ConnectionLost("nobody there")
HOUR = 3600.0
HOOKS = [f"unix:///{n}" for n in range(3)]


def pause(failures: int) -> float:
    return float(min(0.1 * 2 ** min(failures - 1, 20), 30.0))


def make(**options: Any) -> Outbox:
    return Outbox(pause, **{"give_up_after": 600.0, "max_bytes": 1 << 30, **options})


class World:
    """Posts, and sends what the outbox says."""

    def __init__(self, **options: Any) -> None:
        self.box = make(**options)
        self.now = 1000.0
        self.flying: list[Parcel] = []
        self.delivered: list[str] = []
        self.dead: list[Dead] = []

    def post(self, id: str, url: str = HOOKS[0], size: int = 0, reload: Any = None) -> Parcel:
        parcel = Parcel((url, None), id, bytes(size), self.now, reload=reload)
        if self.box.post(parcel, self.now):
            self.flying.append(parcel)
        self.act()
        return parcel

    def act(self) -> None:
        sends, dead = self.box.take()
        for parcel in sends:
            if parcel.payload is None:
                self.box.loaded(parcel, b"again")
        self.flying += sends
        self.dead += dead

    def fail(self, parcel: Parcel, fault: Fault = Fault.LOST) -> None:
        self.flying.remove(parcel)
        self.box.failed(parcel, LOST, fault, self.now)
        self.act()

    def ack(self, parcel: Parcel) -> None:
        self.flying.remove(parcel)
        self.delivered.append(parcel.id)
        self.box.delivered(parcel, self.now)
        self.act()

    def wake(self) -> None:
        when = self.box.next_wake()
        assert when is not None
        self.now = max(self.now, when)
        self.box.tick(self.now)
        self.act()

    def flight_of(self, url: str = HOOKS[0]) -> list[Parcel]:
        return [parcel for parcel in self.flying if parcel.key[0] == url]


def down(count: int = 10, **options: Any) -> World:
    """A hook in trouble, with `count` responses that wait."""
    world = World(**options)
    first = [world.post(str(number)) for number in range(count)]
    for parcel in first:
        world.fail(parcel)
    assert not world.flying
    return world


def test_a_hook_without_trouble_leaves_nothing() -> None:
    world = World()
    parcels = [world.post(str(n), url) for n in range(3) for url in HOOKS]
    assert world.flying == parcels
    for parcel in parcels:
        world.ack(parcel)
    assert (len(world.box), world.box.bytes, world.box.next_wake()) == (0, 0, None)


def test_a_troubled_hook_has_one_probe_and_growing_pauses() -> None:
    world = down()
    pauses = []
    for _ in range(10):
        before = world.now
        world.wake()
        while not world.flying:  # one that rests may be woken first
            world.wake()
        pauses.append(world.now - before)
        (probe,) = world.flying
        world.post("new")
        assert world.flying == [probe]
        world.fail(probe)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0])
    world.post("elsewhere", HOOKS[1])
    assert [parcel.id for parcel in world.flying] == ["elsewhere"]


def test_a_sign_of_life_lets_the_others_go_more_and_more() -> None:
    world = down(500)
    world.wake()
    most = [1]
    while world.flying:
        for parcel in list(world.flying):
            world.ack(parcel)
        most.append(len(world.flying))
    assert most[1] <= 4
    assert max(most) >= 64
    assert len(world.delivered) == 500
    assert (len(world.box), world.box.bytes) == (0, 0)


def test_what_is_refused_rests_and_blocks_nobody() -> None:
    world = World()
    refused, other = world.post("refused"), world.post("other")
    world.fail(refused, Fault.REFUSED)
    world.ack(other)
    world.ack(world.post("new"))
    assert world.flying == []
    world.wake()
    assert world.now == pytest.approx(1000.1)
    assert world.flying == [refused]
    world.ack(refused)
    assert len(world.box) == 0


def test_one_response_that_a_hook_chokes_on_is_not_its_trouble() -> None:
    world = World()
    choking = world.post("choking")
    for _ in range(5):
        world.fail(choking, Fault.SILENT)
        world.ack(world.post("fine"))
        world.wake()
        assert world.flying == [choking]
    second = world.post("second")
    world.fail(choking, Fault.SILENT)
    world.fail(second, Fault.SILENT)
    world.post("waits")
    assert world.flying == []


def test_another_response_is_the_next_probe() -> None:
    world = World()
    poison, good = world.post("poison"), world.post("good")
    world.fail(poison)
    world.fail(good)
    world.wake()
    assert world.flying[0] is good
    world.ack(good)
    assert world.box.next_wake() is not None or world.flying == [poison]


def test_responses_of_one_request_keep_their_order() -> None:
    world = down(1)
    first = world.post("same", size=1)
    second = world.post("same", size=2)
    world.wake()
    while world.flying:
        assert not {first, second} <= set(world.flying)
        assert second not in world.flying or first.payload is None  # which is gone
        for parcel in list(world.flying):
            world.ack(parcel)
    assert sorted(world.delivered) == ["0", "same", "same"]


def test_an_hour_of_outage_loses_nothing_within_a_day() -> None:
    world = down(100, give_up_after=24 * HOUR)
    until = world.now + HOUR
    while world.now < until:
        world.wake()
        for parcel in list(world.flying):
            world.fail(parcel)
    while len(world.delivered) < 100:
        if not world.flying:
            world.wake()
        for parcel in list(world.flying):
            world.ack(parcel)
    assert sorted(world.delivered, key=int) == [str(number) for number in range(100)]
    assert world.dead == []


def test_what_waits_for_too_long_is_given_up_at_a_failed_try_and_told_once() -> None:
    world = down(10)
    world.now += 1000.0  # stopped, for a while: one more try decides
    world.wake()
    assert not world.dead
    world.fail(world.flying[0])
    assert [letter.why for letter in world.dead] == [Why.EXPIRED] * 10
    assert [letter.first for letter in world.dead].count(True) == 1
    assert (len(world.box), world.box.bytes, world.box.next_wake()) == (0, 0, None)


def test_the_oldest_of_the_hook_that_holds_most_go_first() -> None:
    world = World(max_bytes=100_000)
    for url in HOOKS[:2]:
        world.fail(world.post("first", url))
    for number in range(3):
        world.post(f"small-{number}", HOOKS[1], 1000)
    for number in range(20):
        world.post(f"large-{number}", HOOKS[0], 9000)
    assert world.box.bytes <= 100_000
    dropped = [letter.parcel.id for letter in world.dead]
    assert dropped == ["first", *(f"large-{number}" for number in range(len(dropped) - 1))]
    assert {letter.why for letter in world.dead} == {Why.DROPPED}


def test_what_is_stored_is_forgotten_and_loaded_when_it_is_its_turn() -> None:
    world = World(max_bytes=100_000)
    world.fail(world.post("first", reload=print))
    parcels = [world.post(str(number), size=9000, reload=print) for number in range(50)]
    assert world.dead == []
    assert world.box.bytes <= 100_000
    assert parcels[0].payload is None
    assert parcels[-1].payload == bytes(9000)
    while len(world.delivered) < 51:
        if not world.flying:
            world.wake()
        for parcel in list(world.flying):
            assert parcel.payload is not None
            world.ack(parcel)
    assert (len(world.box), world.box.bytes) == (0, 0)


def test_what_is_no_longer_stored_is_given_up_and_the_next_is_the_probe() -> None:
    box = make(max_bytes=OVERHEAD // 2)
    parcels = [Parcel((HOOKS[0], None), str(n), b"", 0.0, reload=print) for n in range(2)]
    for parcel in parcels:
        box.post(parcel, 0.0)
    for parcel in parcels:
        box.failed(parcel, LOST, Fault.LOST, 0.0)
    box.tick(0.1)
    ((probe,), _) = box.take()
    assert probe.payload is None
    box.unstored(probe, LOST, 0.1)
    box.tick(0.1)
    ((other,), (dead,)) = box.take()
    assert {probe, other} == set(parcels)
    assert (dead.parcel, dead.why) == (probe, Why.UNSTORED)


def test_a_hook_that_never_acknowledges_holds_no_more_than_is_under_way() -> None:
    world = World(max_flying_bytes=50_000, max_bytes=100_000)
    for number in range(100):
        world.post(str(number), size=10_000)
    assert len(world.flying) == 4
    assert world.box.bytes <= 100_000
    assert len(world.dead) == 100 - 9


def test_what_waits_behind_one_that_is_dropped_goes_on() -> None:
    world = World(max_bytes=12 * OVERHEAD, max_flying_bytes=6 * OVERHEAD)
    world.fail(world.post("c", size=5 * OVERHEAD), Fault.SILENT)
    for _ in range(2):
        world.post("", "unix:///1", size=OVERHEAD)
    last = world.post("c", size=3 * OVERHEAD)
    assert [letter.parcel.id for letter in world.dead] == ["c"]
    assert last in world.flying


def test_only_so_many_probes_are_under_way() -> None:
    world = World(max_probes=2)
    for number in range(10):
        world.fail(world.post("i", f"unix:///{number}"))
    world.wake()
    seen = []
    while world.flying:
        assert len(world.flying) <= 2
        seen.append(world.flying[0].key)
        world.ack(world.flying[0])
    assert len(set(seen)) == 10


class Machine(RuleBasedStateMachine):
    """Whatever comes: nothing is lost or twice under way, one probe a hook, and in the end all arrives."""

    @initialize(max_bytes=st.sampled_from([1 << 30, 12 * OVERHEAD]), probes=st.sampled_from([1, 256]))
    def begin(self, max_bytes: int, probes: int) -> None:
        self.world = World(max_bytes=max_bytes, max_probes=probes, max_flying_bytes=6 * OVERHEAD)
        self.posted: set[Parcel] = set()
        self.gone: list[Parcel] = []

    @rule(
        url=st.sampled_from(HOOKS),
        id=st.sampled_from(["", "a", "b", "c"]),
        size=st.sampled_from([0, 10, 3000]),
        stored=st.booleans(),
    )
    def post(self, url: str, id: str, size: int, stored: bool) -> None:
        self.posted.add(self.world.post(id, url, size, print if stored else None))

    @rule(data=st.data(), fault=st.sampled_from(list(Fault)))
    def fail(self, data: st.DataObject, fault: Fault) -> None:
        if self.world.flying:
            self.world.fail(data.draw(st.sampled_from(self.world.flying)), fault)

    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        if self.world.flying:
            parcel = data.draw(st.sampled_from(self.world.flying))
            self.gone.append(parcel)
            self.world.ack(parcel)

    @rule(seconds=st.sampled_from([0.0, 0.1, 31.0, 700.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.box.tick(self.world.now)
        self.world.act()

    @invariant()
    def nothing_is_lost_or_twice_under_way(self) -> None:
        world = self.world
        assert len(set(world.flying)) == len(world.flying)
        ended = [*self.gone, *(letter.parcel for letter in world.dead)]
        assert len(set(ended)) == len(ended)
        assert not set(ended) & set(world.flying)
        assert len(self.posted) == len(ended) + len(world.flying) + world.box.waiting
        assert all(parcel.payload is None for parcel in ended if parcel.failures)

    @invariant()
    def what_waits_keeps_within_the_bounds(self) -> None:
        box = self.world.box
        held = sum(parcel.size for parcel in self.world.flying)
        assert held <= box.bytes <= max(box.max_bytes, held)
        if not self.world.flying and not box.waiting:
            assert (len(box), box.bytes, box.next_wake()) == (0, 0, None)

    @invariant()
    def a_troubled_hook_has_one_probe(self) -> None:
        for hook in self.world.box._hooks.values():
            if not hook.plain and hook.failures:
                assert hook.probe is None or hook.probe in self.world.flying

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for _ in range(10_000):
            if self.world.flying:
                for parcel in list(self.world.flying):
                    self.world.ack(parcel)
            elif self.world.box.next_wake() is not None:
                self.world.wake()
            else:
                break
        assert (len(self.world.box), self.world.box.waiting, self.world.box.bytes) == (0, 0, 0)


class TestWhateverComes(Machine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
