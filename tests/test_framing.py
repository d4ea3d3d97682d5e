"""Framing: whole messages out of bytes, however they are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acomm.errors import BadRequest, TooLarge
from acomm.framing import DEFAULT_MAX_FRAME, HEADER, LARGEST_MAX_FRAME, Framer, FrameTooLarge, frame

first_bytes_of_json = [b"{", b"[", b'"', b" ", b"\t", b"\r", b"\n"]


def test_a_frame_is_a_big_endian_length_and_the_payload() -> None:
    assert frame(b"{}") == b"\x00\x00\x00\x02{}"
    assert frame(b"x" * 322)[:4] == bytes.fromhex("00000142")  # as captured from a Go peer


@pytest.mark.parametrize("payload", [b"{}", b"", b'{"id":"x"}', bytes(range(256))])
def test_a_frame_may_be_cut_at_every_offset(payload: bytes) -> None:
    data = frame(payload) + frame(b"second")
    for cut in range(len(data) + 1):
        framer = Framer()
        assert framer.receive(data[:cut]) + framer.receive(data[cut:]) == [payload, b"second"]
        assert framer.receive_eof() == []
        assert not framer.partial


def test_byte_by_byte() -> None:
    framer = Framer()
    data = frame(b"one") + frame(b"") + frame(b"three")
    assert [m for i in range(len(data)) for m in framer.receive(data[i : i + 1])] == [b"one", b"", b"three"]


@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_random_messages_in_random_chunks(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(frame, payloads))
    framer = Framer()
    got: list[bytes] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += framer.receive(stream[:size])
        stream = stream[size:]
    assert got + framer.receive_eof() == payloads


def reading(framer: Framer, pieces: list[bytes]) -> tuple[list[bytes], str]:
    """The messages that come out of `pieces` and the end of the stream, and the error that ends it."""
    found: list[bytes] = []
    try:
        for piece in pieces:
            found += framer.receive(piece)
            assert framer.pending <= framer.needs <= framer.max_frame + 4
        found += framer.receive_eof()
    except FrameTooLarge as error:
        return found + error.messages, str(error)
    except BadRequest as error:
        return found, str(error)
    finally:
        assert not framer.partial or framer.raw is not None
    return found, ""


streams = st.lists(
    st.binary(max_size=40).map(frame)  # the limit is 32
    | st.integers(0, 2**32 - 1).map(HEADER.pack)
    | st.binary(max_size=6)
    | st.sampled_from([b"{", b'{"id":1}', b"\xff\xff\xff\xff", b"\x00\x00\x00\x20"]),
    max_size=6,
).map(b"".join)


@given(streams, st.lists(st.integers(0, 300), max_size=6))
def test_whatever_comes_means_the_same_however_it_is_cut(stream: bytes, cuts: list[int]) -> None:
    at = sorted(min(cut, len(stream)) for cut in cuts)
    pieces = [stream[a:b] for a, b in zip([0, *at], [*at, len(stream)], strict=True)]
    whole = reading(Framer(32), [stream])
    assert reading(Framer(32), pieces) == whole
    assert reading(Framer(32), [stream[at : at + 1] for at in range(len(stream))]) == whole
    assert all(len(message) <= 32 for message in whole[0])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_message_in_many_pieces_is_looked_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at all that has come would make a message cost the square of its length."""
    looked = 0
    split = Framer._split

    def counting(self: Framer, data: bytes) -> list[bytes]:
        nonlocal looked
        looked += len(data)
        return split(self, data)

    monkeypatch.setattr(Framer, "_split", counting)
    messages = [b"x" * 100_000, b"", b"y", b"z" * 5000]
    stream = b"".join(map(frame, messages))
    framer = Framer()
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert [message for piece in pieces for message in framer.receive(piece)] == messages
    assert looked < 1.1 * len(stream)


def test_eof_inside_a_message_says_how_much_is_missing() -> None:
    data = frame(b"0123456789")
    for cut in range(1, len(data)):
        framer = Framer()
        framer.receive(data[:cut])
        assert framer.partial
        assert framer.pending == cut
        wanted = "length header of 4" if cut < 4 else f"{cut - 4} of 10 bytes"
        with pytest.raises(BadRequest, match=wanted):
            framer.receive_eof()


def test_a_lying_length_waits_and_keeps_no_more_than_what_came() -> None:
    framer = Framer()
    assert framer.receive(b"\x03\xff\xff\xff{}") == []
    assert framer.pending == 6
    with pytest.raises(BadRequest, match="2 of 67108863 bytes"):
        framer.receive_eof()


@pytest.mark.parametrize("header", [b"\xff\xff\xff\xff", b"\x04\x00\x00\x01", b"\x00\x00\x00\x11"])
def test_an_oversized_frame_is_refused_on_its_header_alone(header: bytes) -> None:
    framer = Framer(16 if header[0] == 0 else DEFAULT_MAX_FRAME)
    with pytest.raises(FrameTooLarge, match=f"frame of {int.from_bytes(header)} bytes") as caught:
        framer.receive(frame(b"whole") + header)
    assert caught.value.messages == [b"whole"]
    assert isinstance(caught.value, TooLarge)
    assert framer.pending == 0


def test_a_frame_of_exactly_the_limit_passes() -> None:
    assert Framer(16).receive(frame(b"x" * 16)) == [b"x" * 16]


@pytest.mark.parametrize("start", [b"", b"{"])
def test_what_follows_an_oversized_message_is_dropped(start: bytes) -> None:
    framer = Framer(16)
    with pytest.raises(FrameTooLarge):
        framer.receive(start + b"\x7f" * 17)
    assert framer.receive(frame(b"looks whole")) == []
    assert framer.receive_eof() == []


@pytest.mark.parametrize("first", first_bytes_of_json)
def test_json_without_a_header_ends_with_the_stream(first: bytes) -> None:
    framer = Framer()
    assert framer.raw is None
    assert framer.receive(first) == []
    assert framer.raw is True
    assert framer.receive(b'"id":1}') == []
    assert framer.partial
    assert framer.receive_eof() == [first + b'"id":1}']


def test_json_without_a_header_is_limited_too() -> None:
    framer = Framer(16)
    framer.receive(b"{" + b" " * 15)
    with pytest.raises(FrameTooLarge, match="limit of 16 bytes"):
        framer.receive(b" ")


def test_no_length_within_the_limit_looks_like_json() -> None:
    for first in first_bytes_of_json:
        assert int.from_bytes(first + bytes(3)) > LARGEST_MAX_FRAME
    framer = Framer(LARGEST_MAX_FRAME)
    framer.receive(LARGEST_MAX_FRAME.to_bytes(4))
    assert framer.raw is False


@pytest.mark.parametrize("limit", [0, -1, LARGEST_MAX_FRAME + 1])
def test_a_limit_that_would_misread_the_first_byte_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="max_frame"):
        Framer(limit)


def test_nothing_received_is_nothing() -> None:
    framer = Framer()
    assert framer.receive(b"") == []
    assert framer.receive_eof() == []
    assert framer.raw is None
