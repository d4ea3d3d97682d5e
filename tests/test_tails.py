"""The last of what a worker wrote: bounds, order, and what belongs to a call."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.tails import DUMP, PIECES, STDERR, STDOUT, TAIL, Said, Tail, pack, text_since, unpack

pieces = st.lists(
    st.one_of(st.binary(max_size=50), st.integers(0, 3 * TAIL).map(lambda n: b"x" * n)), max_size=40
)
said = st.lists(
    st.builds(
        Said,
        st.sampled_from([STDOUT, STDERR, DUMP]),
        st.floats(0, 1e9),
        st.binary(max_size=100),
    )
)


@given(pieces)
def test_a_tail_is_the_end_of_what_was_written(written: list[bytes]) -> None:
    tail = Tail(STDERR)
    for when, data in enumerate(written):
        tail.add(data, float(when))
    kept = b"".join(piece.data for piece in tail)
    whole = b"".join(written)
    assert whole.endswith(kept)
    assert len(kept) == min(TAIL, len(whole))
    assert [piece.when for piece in tail] == sorted(piece.when for piece in tail)
    assert {piece.stream for piece in tail} <= {STDERR}


@given(st.integers(0, 3 * PIECES))
def test_many_small_pieces_are_bounded(count: int) -> None:
    tail = Tail(STDOUT)
    for when in range(count):
        tail.add(b"%d" % (when % 10), float(when))
    assert [piece.when for piece in tail] == [float(n) for n in range(max(0, count - PIECES), count)]


@given(said)
def test_what_is_packed_is_unpacked(pieces: list[Said]) -> None:
    assert unpack(pack(pieces)) == tuple(pieces)


def test_all_that_is_kept_fits_into_one_datagram() -> None:
    tails = [Tail(stream) for stream in (STDOUT, STDERR, DUMP)]
    for tail in tails:
        for when in range(2 * PIECES):
            tail.add(b"x" * 1000, float(when))
            tail.add(b"x", float(when))
    assert len(pack(piece for tail in tails for piece in tail)) < 60_000


@given(said, st.floats(0, 1e9))
def test_what_was_read_before_the_call_is_not_its_own(pieces: list[Said], start: float) -> None:
    for stream in (STDOUT, STDERR, DUMP):
        own = b"".join(p.data for p in pieces if p.stream == stream and p.when >= start)
        assert text_since(pieces, stream, start) == own.decode("utf-8", "replace")
