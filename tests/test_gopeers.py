"""Whatever a supervisor sends to programs written in Go, they can read, and it does not kill them."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, GoPeer, ack, connected, frame, read_frame
from serving import Fifo, Served

KEYS = {2: ["error", "id", "result", "stream_url"], 3: ["error", "id", "result", "streamURL"]}


class TestThePeerItself:
    """It would be worth nothing if it passed over what it is there for."""

    @pytest.mark.parametrize("generation", [2, 3])
    @pytest.mark.parametrize(
        ("pieces", "fault"),
        [
            ([frame(b"null")], "null"),
            ([frame(b" null\n")], "null"),
            ([b"\0\0", b"\0\2{}"], "header in pieces"),
            ([frame(b"{}") + frame(b"{}")], "more than one message"),
        ],
    )
    def test_what_kills_or_misleads_a_go_program_fails_the_test(
        self, tmp_path: Path, generation: int, pieces: list[bytes], fault: str
    ) -> None:
        peer = GoPeer(tmp_path / "go.sock", generation=generation)
        with connected(peer.path) as sock:
            sock.sendall(pieces[0])
            with peer.changed:  # the first piece is read by itself
                assert peer.changed.wait_for(lambda: peer.faults or len(pieces) == 1, WAIT)
            if len(pieces) == 1:
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(100):
                    pass
        with pytest.raises(AssertionError, match=fault):
            peer.close()

    def test_a_body_beyond_the_sockets_buffer_is_lost_on_generation_2(self, tmp_path: Path) -> None:
        body = json.dumps({"id": "i", "result": "x" * 1_000_000}).encode()
        for generation, read in ((2, 0), (3, 1)):
            with GoPeer(tmp_path / "go.sock", generation=generation) as peer:
                with connected(peer.path) as sock:
                    try:
                        sock.sendall(frame(body))
                        assert bool(sock.recv(100)) is bool(read)
                    except ConnectionError:
                        assert not read
                with peer.changed:
                    assert peer.changed.wait_for(lambda: not peer.open, WAIT)
                assert len(peer.messages) == read


def answers(hook: GoPeer, count: int) -> list[dict[str, Any]]:
    """The messages when there are so many. Fails after WAIT seconds."""
    with hook.changed:
        assert hook.changed.wait_for(lambda: len(hook.messages) >= count, WAIT), hook.messages
    return hook.messages


def spelled(generation: int, id: str, task: str, hook: GoPeer, args: Any) -> bytes:
    url = {"Scheme": "unix", "Opaque": "", "User": None, "Host": "", "Path": hook.path, "RawQuery": ""}
    if generation == 2:
        message = {"id": id, "task": task, "responsehook": url, "args": args}
    else:
        message = {
            "id": id,
            "task": task,
            "taskURL": None,
            "responseHook": url,
            "streamURL": None,
            "args": args,
        }
    return json.dumps(message).encode()


def ask(served: Served, message: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(served.ask(message))
    return answer


@pytest.mark.process
@pytest.mark.parametrize("generation", [2, 3])
class TestAnswers:
    @pytest.fixture
    def served(self, tmp_path: Path) -> Iterator[Served]:
        with Served(tmp_path) as served:
            yield served

    @pytest.fixture
    def hook(self, tmp_path: Path, generation: int) -> Iterator[GoPeer]:
        key = KEYS[generation][-1]
        peer = GoPeer(tmp_path / "hook.sock", lambda message: ack(key=key), generation=generation)
        with peer:
            yield peer

    def test_of_every_kind(self, served: Served, hook: GoPeer, generation: int, started: Fifo) -> None:
        calls: dict[str, tuple[str, Any, str]] = {
            "sum": ("add", {"a": 1, "b": 2}, ""),
            "none": ("echo", None, ""),
            "null": ("echo", [None], ""),
            "failed": ("fail", ["no luck"], "ValueError: no luck"),
            "empty": ("fail", [""], "ValueError"),
            "lost": ("die", ["x"], "SIGKILL"),
            "late": ("limited", [started.path], "0.2"),
            "stats": ("acomm.stats", None, ""),
            "tasks": ("acomm.tasks", None, ""),
            "cancel": ("acomm.cancel", ["nobody"], ""),
        }
        for id, (task, args, _) in calls.items():
            taken = ask(served, spelled(generation, id, task, hook, args))
            assert (list(taken), taken["error"], taken["id"]) == (KEYS[generation], "", id)
        got = {answer["id"]: answer for answer in answers(hook, len(calls))}
        assert set(got) == set(calls)
        for id, (_, _, error) in calls.items():
            assert list(got[id]) == KEYS[generation]
            assert error in got[id]["error"] and bool(got[id]["error"]) is bool(error)
        assert (got["sum"]["result"], got["none"]["result"], got["null"]["result"]) == (3, None, None)

    def test_a_repeat_is_answered_again(self, served: Served, hook: GoPeer, generation: int) -> None:
        for count in (1, 2):
            assert ask(served, spelled(generation, "i", "add", hook, [1]))["error"] == ""
            assert [answer["result"] for answer in answers(hook, count)] == [1] * count
        conflict = ask(served, spelled(generation, "i", "add", hook, [2]))
        assert list(conflict) == KEYS[generation]
        assert conflict["error"]

    @pytest.mark.parametrize("bad", [b"null", b"{", b"[]", b"7", b"", b'{"id":null}'])
    def test_refusals_are_objects(self, served: Served, hook: GoPeer, generation: int, bad: bytes) -> None:
        refusal = ask(served, bad)
        assert list(refusal) in KEYS.values()
        assert refusal["error"]
        assert isinstance(refusal["id"], str)

    def test_many_at_once_come_one_a_connection(self, served: Served, hook: GoPeer, generation: int) -> None:
        for number in range(200):
            assert ask(served, spelled(generation, f"{number}", "add", hook, [number]))["error"] == ""
        assert {answer["result"] for answer in answers(hook, 200)} == set(range(200))
        assert hook.connections == 200

    def test_what_the_end_leaves_undone(
        self, served: Served, hook: GoPeer, generation: int, started: Fifo, tmp_path: Path
    ) -> None:
        with connected(served.path) as late:
            assert ask(served, spelled(generation, "i", "stay", hook, [started.path]))["error"] == ""
            started.read()
            served.signal(signal.SIGTERM)
            assert served.notified() == "STOPPING=1"
            late.sendall(frame(spelled(generation, "late", "add", hook, [1])))
            refusal = json.loads(read_frame(late))
            assert (list(refusal), refusal["id"]) == (KEYS[generation], "late")
            assert "stopping" in refusal["error"]
            served.signal(signal.SIGTERM)
            (answer,) = answers(hook, 1)
        assert (list(answer), answer["id"]) == (KEYS[generation], "i")
        assert "stopped" in answer["error"]

    def test_a_large_one(self, served: Served, hook: GoPeer, generation: int) -> None:
        for count, size in enumerate((60_000, 1_000_000), 1):
            assert ask(served, spelled(generation, f"{size}", "echo", hook, ["x" * size]))["error"] == ""
            answer = answers(hook, count)[-1]
            assert answer["id"] == f"{size}"
            if generation == 2 and size == 1_000_000:
                # One that cannot be read is no answer, however often it comes.
                assert len(hook.unreadable) == 2
                assert answer["error"].startswith(f"the response has {hook.unreadable[0]} bytes")
                assert answer["result"] is None
            else:
                assert (answer["error"], answer["result"]) == ("", "x" * size)
        served.until(lambda stats: stats["hooks"]["pending"] == 0)
