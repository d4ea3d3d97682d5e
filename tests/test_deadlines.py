"""Deadlines: what is due comes out once and in order; what was dropped never does."""

from hypothesis import given
from hypothesis import strategies as st

from acomm.deadlines import Deadlines


def test_expired_keys_come_out_once_earliest_first() -> None:
    due: Deadlines[str] = Deadlines()
    for key, when in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("d", 9.0)):
        due.set(key, when)
    assert due.next() == 1.0
    assert due.expired(3.0) == ["a", "b", "c"]
    assert due.expired(3.0) == []
    assert due.next() == 9.0
    assert len(due) == 1
    assert "d" in due
    assert "a" not in due


def test_a_dropped_key_is_not_due() -> None:
    due: Deadlines[str] = Deadlines()
    due.set("a", 1.0)
    due.discard("a")
    due.discard("never set")
    assert due.next() is None
    assert due.expired(2.0) == []


def test_setting_again_moves_the_deadline_either_way() -> None:
    due: Deadlines[str] = Deadlines()
    due.set("a", 1.0)
    due.set("a", 5.0)
    assert due.expired(2.0) == []
    due.set("a", 3.0)
    assert due.next() == 3.0
    assert due.expired(3.0) == ["a"]
    assert due.expired(9.0) == []


def test_postponing_moves_all_and_keeps_their_order() -> None:
    due: Deadlines[str] = Deadlines()
    due.set("b", 2.0)
    due.set("a", 1.0)
    due.set("gone", 0.0)
    due.discard("gone")
    due.postpone(10.0)
    assert due.expired(10.9) == []
    assert due.expired(12.0) == ["a", "b"]


def test_dropped_keys_do_not_pile_up() -> None:
    due: Deadlines[int] = Deadlines()
    for key in range(10_000):
        due.set(key, 60.0)
        due.discard(key)
    assert len(due._heap) < 200


@given(
    st.lists(
        st.tuples(st.sampled_from(["set", "discard", "expire"]), st.integers(0, 5), st.integers(0, 20)),
        max_size=200,
    )
)
def test_it_agrees_with_a_plain_dictionary(steps: list[tuple[str, int, int]]) -> None:
    due: Deadlines[int] = Deadlines()
    model: dict[int, float] = {}
    for verb, key, when in steps:
        if verb == "set":
            due.set(key, when)
            model[key] = when
        elif verb == "discard":
            due.discard(key)
            model.pop(key, None)
        else:
            gone = due.expired(when)
            assert sorted(gone) == sorted(k for k, w in model.items() if w <= when)
            times = [model.pop(k) for k in gone]
            assert times == sorted(times)
        assert due.next() == min(model.values(), default=None)
        assert len(due) == len(model)
