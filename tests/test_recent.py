"""Recent: which ids are known, for how long, and what they keep."""

import msgspec
import pytest

from acomm.errors import TaskError
from acomm.messages import Request, Response
from workers.recent import Recent, digest


def response(id: str, result: bytes = b"1") -> Response:
    return Response(id, msgspec.Raw(result))


def request(id: str = "a", task: str = "t", args: object = None, hook: str | None = None) -> Request:
    return Request(task, args, id=id, response_hook=hook)


class TestDigest:
    def test_is_that_of_task_arguments_and_hook(self) -> None:
        plain = digest(request())
        assert digest(request(id="b")) == plain
        assert digest(request(args=msgspec.Raw(b"[1]"))) == digest(request(args=msgspec.Raw(b"[1]")))

    @pytest.mark.parametrize(
        "other",
        [request(task="u"), request(args=msgspec.Raw(b"null")), request(hook="unix:///a")],
        ids=["task", "args", "hook"],
    )
    def test_differs_with_each(self, other: Request) -> None:
        assert digest(other) != digest(request())

    def test_tells_spellings_of_one_value_apart(self) -> None:
        assert digest(request(args=msgspec.Raw(b"[1]"))) != digest(request(args=msgspec.Raw(b"[ 1]")))


class TestRecent:
    def test_an_id_is_known_from_its_acceptance_on(self) -> None:
        recent = Recent()
        assert recent.known("a", 0) is None
        recent.begin("a", 7)
        assert recent.known("a", 0) == 7
        assert recent.answer("a") is None
        answer = response("a")
        recent.finish(answer, 1.0)
        assert recent.known("a", 2) == 7
        assert recent.answer("a") is answer
        assert len(recent) == 1

    def test_a_digest_of_zero_is_known_too(self) -> None:
        recent = Recent()
        recent.begin("a", 0)
        assert recent.known("a", 0) == 0
        recent.finish(response("a"), 0)
        assert recent.known("a", 0) == 0

    def test_an_answered_id_is_forgotten_in_time_even_if_nothing_comes_after_it(self) -> None:
        recent = Recent(seconds=600)
        recent.begin("a", 7)
        recent.finish(response("a"), 100)
        assert recent.known("a", 699) == 7
        assert recent.known("a", 700) is None
        assert recent.answer("a") is None
        assert len(recent) == 0

    def test_an_id_in_flight_is_not(self) -> None:
        recent = Recent(seconds=600, ids=1)
        recent.begin("a", 7)
        for number in range(5):
            recent.begin(str(number), number)
            recent.finish(response(str(number)), 1e6)
        assert recent.known("a", 1e9) == 7

    def test_the_oldest_make_room(self) -> None:
        recent = Recent(ids=3)
        for number in range(5):
            recent.begin(str(number), number)
            recent.finish(response(str(number)), number)
        assert [recent.known(str(number), 5) for number in range(5)] == [None, None, 2, 3, 4]

    def test_large_answers_make_room_sooner(self) -> None:
        recent = Recent(max_bytes=1000)
        for number in range(5):
            recent.begin(str(number), number)
            recent.finish(response(str(number), b"1" * 400), number)
        assert [recent.known(str(number), 5) for number in range(5)] == [None, None, None, 3, 4]

    @pytest.mark.parametrize(
        "large",
        [
            Response("x" * 1000, msgspec.Raw(b"1")),
            Response("a", error=TaskError("x" * 1000)),
            Response("a", error=TaskError("x", traceback="x" * 1000)),
        ],
        ids=["id", "message", "traceback"],
    )
    def test_whatever_it_is_that_is_large(self, large: Response) -> None:
        recent = Recent(max_bytes=999)
        recent.begin(large.id, 1)
        recent.finish(large, 0)
        assert len(recent) == 0

    def test_room_is_given_back(self) -> None:
        recent = Recent(seconds=10, max_bytes=1000)
        for number in range(100):
            recent.begin("a", number)
            recent.finish(response("a", b"1" * 900), number * 20)
            assert recent.known("a", number * 20 + 1) == number
            assert recent.known("a", number * 20 + 15) is None

    def test_an_answer_to_nothing_is_ignored(self) -> None:
        recent = Recent()
        recent.finish(response("a"), 0)
        assert len(recent) == 0


class TestInheritance:
    """What the supervisor has taken that was there before."""

    def test_is_known_and_expected_until_it_is_done(self) -> None:
        old, new = Recent(), Recent(seconds=10)
        old.begin("done", b"1")
        old.finish(response("done"), 0)
        old.begin("running", b"2")
        new.inherit(old.export())
        assert new.known("done", 1) == b"1"
        assert new.known("running", 1) == b"2"
        assert new.expected("running", 1000)
        new.inheritance_ended(1000, done=True)
        assert new.expected("running", 1001)
        assert not new.expected("running", 1006)
        assert new.known("running", 1009) == b"2"
        assert new.known("running", 1011) is None

    def test_is_lost_with_one_that_dies(self) -> None:
        recent = Recent()
        recent.inherit([("a", b"1")])
        recent.inheritance_ended(1, done=False)
        assert recent.known("a", 1) is None
        assert not recent.expected("a", 1)

    def test_goes_to_the_next_one(self) -> None:
        first, second = Recent(), Recent()
        first.inherit([("a", b"1")])
        second.inherit(first.export())
        assert second.known("a", 0) == b"1"


def test_an_id_that_is_answered_again_counts_once() -> None:
    """As one that is replayed: its earlier answers must not take the room of others'."""
    recent = Recent(max_bytes=2000)
    for _ in range(10):
        recent.begin("a", b"d")
        recent.finish(response("a", b'"%b"' % (b"x" * 500)), 1.0)
    recent.begin("b", b"d")
    recent.finish(response("b"), 1.0)
    assert recent.known("a", 1.0) == b"d"
    assert recent.known("b", 1.0) == b"d"
