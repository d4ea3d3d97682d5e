"""A gibibyte from a task through the HTTP door: whole, and in constant memory at every process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPResponse

import psutil
import pytest
from doors import HttpHook, ServedDoor
from serving import request

pytestmark = pytest.mark.process

MEBI = 1024 * 1024
NUMBER = 1024
ROOM = 16 * MEBI


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    folder = tmp_path_factory.mktemp("large")
    with ServedDoor(folder, "-w", "1", modules=("streamtasks",)) as served:
        yield served


class Sizes:
    """Resident memory of the supervisor, its descendants and this process, and how far it has grown."""

    def __init__(self, served: ServedDoor) -> None:
        supervisor = psutil.Process(served.pid)
        self._processes = [psutil.Process(), supervisor, *supervisor.children(recursive=True)]
        self._before = self._now()
        self.grown = [0] * len(self._processes)

    def _now(self) -> list[int]:
        return [process.memory_info().rss for process in self._processes]

    def look(self) -> None:
        grown = [now - before for now, before in zip(self._now(), self._before, strict=True)]
        self.grown = [max(pair) for pair in zip(self.grown, grown, strict=True)]


def take(reply: HTTPResponse, number: int, sizes: Sizes | None = None) -> None:
    """Read `number` mebibytes, of which the n-th is full of the byte n."""
    buffer = bytearray(MEBI)
    for n in range(number):
        view = memoryview(buffer)
        while view:
            size = reply.readinto(view)
            assert size, f"the stream ended within mebibyte {n}"
            view = view[size:]
        assert buffer.count(n % 256) == MEBI
        if sizes is not None and n % 64 == 0:
            sizes.look()
    assert reply.read() == b""


def test_through_the_stream_proxy(served: ServedDoor) -> None:
    with HttpHook() as hook:

        def read(id: str, number: int, sizes: Sizes | None = None) -> None:
            ack = json.loads(
                served.ask(request(id, "chunks", f"http://127.0.0.1:{hook.port}/hook", [number, MEBI]))
            )
            assert ack["error"] == ""
            _, answer = hook.next()
            url = answer["streamURL"]
            assert url["Path"] == "/stream"
            connection, reply = served.open("GET", f"{url['Path']}?{url['RawQuery']}")
            assert reply.status == 200
            take(reply, number, sizes)
            connection.close()

        read("warm", 32)  # what is allocated once
        sizes = Sizes(served)
        read("large", NUMBER, sizes)
        sizes.look()
        assert max(sizes.grown) < ROOM, sizes.grown


def test_as_the_answer_of_a_call(served: ServedDoor) -> None:
    def read(number: int, sizes: Sizes | None = None) -> None:
        headers = {"Content-Type": "application/json", **served.headers()}
        connection, reply = served.open("POST", "/call/chunks", json.dumps([number, MEBI]), headers)
        assert (reply.status, reply.headers["Content-Type"]) == (200, "application/octet-stream")
        take(reply, number, sizes)
        connection.close()

    read(32)
    sizes = Sizes(served)
    read(NUMBER, sizes)
    sizes.look()
    assert max(sizes.grown) < ROOM, sizes.grown
