"""Framing: whole messages out of bytes, however they are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acomm.errors import BadRequest, TooLarge
from acomm.framing import DEFAULT_MAX_FRAME, LARGEST_MAX_FRAME, Framer, FrameTooLarge, frame

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
