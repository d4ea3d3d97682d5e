"""The HTTP door of a supervisor, by real requests: calls, messages, and who is let in."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from doors import JSON, SECURITY, Caller, HttpHook, ServedDoor
from peers import WAIT, connected, frame
from serving import Fifo, Hook, environment, request, serve_command

from workers import launch
from workers.errors import ConfigError

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def hook() -> Iterator[HttpHook]:
    with HttpHook() as hook:
        yield hook


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, hook: HttpHook) -> Iterator[ServedDoor]:
    arguments = ("--http-host", "api.example.org", "--allow-hook", f"127.0.0.1:{hook.port}")
    with ServedDoor(tmp_path_factory.mktemp("door"), *arguments) as door:
        yield door
        assert "Traceback" not in door.stderr()
        assert door.token is not None and door.token not in door.stderr()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("small"), "--max-frame", "4096") as door:
        yield door


class TestCalls:
    def test_the_answer_is_the_result(self, door: ServedDoor) -> None:
        reply = door.call("add", {"a": 1, "b": 2})
        assert (reply.status, reply.json) == (200, 3)
        assert SECURITY.items() <= reply.headers.items()
        assert reply.headers["Server"] == "acomm"
        assert reply.headers["Date"].endswith(" GMT")

    @pytest.mark.parametrize(
        ("task", "args", "result"),
        [
            ("add", b"[4,5]", 9),
            ("add", b" [4] ", 4),
            ("add", b"7", 7),
            ("echo", b"null", None),
            ("echo", b"", None),
            ("echo", '{"value":"é\\u0000<b>"}'.encode(), "é\0<b>"),
            ("reverse", b'["AQI="]', "AgE="),
            ("shift", b'{"point":{"x":1},"by":2}', {"x": 3, "y": 2}),
            ("%61dd", b"[1]", 1),
        ],
    )
    def test_arguments(self, door: ServedDoor, task: str, args: bytes, result: Any) -> None:
        reply = door.call(task, args)
        assert (reply.status, reply.json) == (200, result)

    def test_without_a_body_or_a_type_of_one(self, door: ServedDoor) -> None:
        reply = door.send("POST", "/call/echo", None, door.headers())
        assert (reply.status, reply.json) == (200, None)

    def test_a_large_result_comes_whole(self, door: ServedDoor) -> None:
        text = "x" * 3_000_000
        assert door.call("echo", [text]).json == text

    def test_options(self, door: ServedDoor) -> None:
        assert door.call("add", [1], query="?timeout=20&priority=-3").json == 1

    def test_a_verb_of_the_supervisor(self, door: ServedDoor) -> None:
        assert door.call("acomm.stats").json["http"]["url"] == door.http_url
        assert {task["name"] for task in door.call("acomm.tasks").json} >= {"add", "echo"}

    @pytest.mark.parametrize(
        ("task", "args", "query", "status", "code", "said"),
        [
            ("add", b"{", "", 400, "bad_request", "the arguments: text ends too early"),
            ("add", b"[1] x", "", 400, "bad_request", "the arguments: "),
            ("add", b'["\xff"]', "", 400, "bad_request", "not UTF-8"),
            ("echo", b'["\\ud800"]', "", 400, "bad_request", "surrogate"),
            ("echo", b"[1e999]", "", 400, "bad_request", "out of range"),
            ("echo", b"[" * 10_000, "", 400, "bad_request", "nested too deeply"),
            ("add", b"[1]", "?timeout=soon", 400, "bad_request", "timeout must be a number, not soon"),
            ("add", b"[1]", "?timeout=-1", 400, "bad_request", "positive number of seconds"),
            ("add", b"[1]", "?timeout=nan", 400, "bad_request", "positive number of seconds"),
            ("add", b"[1]", "?priority=1.5", 400, "bad_request", "priority must be a number, not 1.5"),
            ("add", b"[1]", "?priority=99999999999", 400, "bad_request", "within 2147483647"),
            ("add", b"[1]", "?tiemout=1", 400, "bad_request", "unknown option tiemout; known"),
            ("add", b"[1]", "?timeout=1&timeout=2", 400, "bad_request", "given twice"),
            ("adds", b"[1]", "", 404, "unknown_task", "did you mean add?"),
            ("a%0Ab", b"[1]", "", 400, "bad_request", "control characters"),
            ("%ff", b"[1]", "", 404, "unknown_task", "no task"),
            ("x" * 300, b"[1]", "", 400, "bad_request", "longer than 255"),
            ("add", b'["x"]', "", 422, "bad_args", "expected int, got str"),
            ("crunch", b"[]", "?timeout=0.1", 422, "timeout", "timed out"),
            ("acomm.nothing", b"", "", 404, "unknown_task", "known: acomm.cancel"),
        ],
    )
    def test_refusals(
        self, door: ServedDoor, task: str, args: bytes, query: str, status: int, code: str, said: str
    ) -> None:
        reply = door.call(task, args, query=query)
        assert (reply.status, reply.error["code"]) == (status, code)
        assert said in reply.error["message"]
        assert SECURITY.items() <= reply.headers.items()

    def test_a_task_that_raises(self, door: ServedDoor) -> None:
        reply = door.call("fail", ["<script>"])
        assert reply.status == 422
        assert reply.error["code"] == "task_error"
        assert (reply.error["type"], reply.error["message"]) == ("ValueError", "ValueError: <script>")
        assert "servedtasks.py" in reply.error["traceback"]

    def test_a_worker_that_dies(self, door: ServedDoor) -> None:
        reply = door.call("die", ["x"])
        assert (reply.status, reply.error["code"]) == (503, "worker_lost")
        assert reply.error["receipt"]["signal"] == signal.SIGKILL
        assert "Retry-After" not in reply.headers

    @pytest.mark.parametrize(
        ("headers", "said"),
        [
            ({}, "Content-Type must be application/json, not missing"),
            ({"Content-Type": "text/plain"}, "not text/plain"),
            ({"Content-Type": "application/x-www-form-urlencoded"}, "not application/x-www"),
            ({**JSON, "Content-Encoding": "gzip"}, "compressed"),
        ],
    )
    def test_what_is_not_said_to_be_plain_json(
        self, door: ServedDoor, headers: dict[str, str], said: str
    ) -> None:
        reply = door.send("POST", "/call/add", b"[1]", {**door.headers(), **headers})
        assert (reply.status, reply.error["code"]) == (400, "bad_request")
        assert said in reply.error["message"]

    def test_parameters_of_the_type(self, door: ServedDoor) -> None:
        kind = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert door.send("POST", "/call/add", b"[1]", {**door.headers(), **kind}).json == 1

    def test_a_task_that_streams(self, tmp_path: Path) -> None:
        with ServedDoor(tmp_path, "-w", "1", modules=("fuzzedtasks",)) as door:
            lines = door.call("sprout", [["a", "b"]])
            assert (lines.status, lines.headers["Content-Type"]) == (200, "application/x-ndjson")
            assert [json.loads(line)["name"] for line in lines.body.splitlines()] == ["a", "b"]
            chunks = door.call("repeat", ["é"])
            assert chunks.headers["Content-Type"] == "application/octet-stream"
            assert chunks.body == "ééé".encode()
            assert door.call("sprout", [[]]).body == b""

    def test_who_leaves_does_not_stop_the_call(self, door: ServedDoor, started: Fifo, release: Fifo) -> None:
        before = door.until(lambda stats: stats["tracked"] == 0)
        body = json.dumps([started.path, release.path]).encode()
        with door.connect() as sock:
            sock.sendall(http("POST /call/hold", door, body))
            started.read()
        door.until(lambda stats: stats["http"]["connections"] == 0)
        assert door.stats()["tracked"] == 1
        release.close()
        after = door.until(lambda stats: stats["tracked"] == 0)
        assert after["counts"]["ok"] == before["counts"].get("ok", 0) + 1

    def test_who_leaves_before_his_stream_begins_keeps_no_worker(
        self, short_folder: Path, started: Fifo, release: Fifo
    ) -> None:
        with ServedDoor(short_folder, "-w", "1", modules=("streamtasks", "servedtasks")) as door:
            holding = threading.Thread(target=door.call, args=("hold", [started.path, release.path]))
            holding.start()
            started.read()
            with door.connect() as sock:
                sock.sendall(http("POST /call/count", door, b"[3]"))
                door.until(lambda stats: stats["queued"] == 1)
            door.until(lambda stats: stats["http"]["connections"] == 1)
            release.close()
            holding.join(WAIT)
            stats = door.until(lambda stats: stats["tracked"] == 0 and not stats["streams"]["open"])
            assert stats["streams"]["cancelled"] == 1

    def test_a_cancelled_call(self, door: ServedDoor, started: Fifo, hook: HttpHook) -> None:
        message = request("to-cancel", "stay", f"http://127.0.0.1:{hook.port}/c", [started.path])
        assert door.post(message).json["error"] == ""
        started.read()
        assert door.call("acomm.cancel", ["to-cancel"]).json is True
        path, answer = hook.next()
        assert (path, answer["id"]) == ("/c", "to-cancel")
        assert "cancelled" in answer["error"]


class TestConnections:
    def test_many_calls_on_one_and_before_the_answers(self, door: ServedDoor) -> None:
        with door.connect() as sock:
            sock.sendall(b"".join(http("POST /call/add", door, b"[%d]" % number) for number in range(50)))
            file = sock.makefile("rb")
            for number in range(50):
                assert read_reply(file) == (200, b"%d" % number)

    def test_one_that_is_to_be_closed(self, door: ServedDoor) -> None:
        answer = door.raw(http("POST /call/add", door, b"[1]", "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\n1")

    def test_an_older_http(self, door: ServedDoor) -> None:
        answer = door.raw(http("POST /call/add", door, b"[1]").replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        assert answer.split(b"\r\n")[0].endswith(b" 200 OK")
        assert answer.endswith(b"\r\n\r\n1")

    def test_a_body_in_chunks_and_in_pieces(self, door: ServedDoor) -> None:
        head = http("POST /call/add", door, None, "Transfer-Encoding: chunked", "Connection: close")
        with door.connect() as sock:
            for piece in (head, b"3\r\n[1,\r\n", b"2\r\n 2\r", b"\n1\r\n]\r\n0\r\n", b"\r\n"):
                sock.sendall(piece)
            answer = sock.makefile("rb").read()
        assert answer.endswith(b"\r\n\r\n3")

    def test_who_waits_before_sending_the_body_is_told_to_go_on(self, door: ServedDoor) -> None:
        head = http("POST /call/add", door, None, "Content-Length: 3", "Expect: 100-continue")
        with door.connect() as sock:
            sock.sendall(head)
            file = sock.makefile("rb")
            assert file.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert file.readline() == b"\r\n"
            sock.sendall(b"[5]")
            assert read_reply(file) == (200, b"5")

    def test_who_waits_in_vain_is_told_at_once(self, door: ServedDoor) -> None:
        with door.connect() as sock:
            stranger = Caller(door.http_url, None)
            sock.sendall(http("POST /call/add", stranger, None, "Content-Length: 3", "Expect: 100-continue"))
            assert read_reply(sock.makefile("rb"))[0] == 401

    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
            b"GARBAGE\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost localhost\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
            b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"POST * HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"<script>alert(1)</script>\r\n\r\n",
        ],
    )
    def test_what_is_not_http(self, door: ServedDoor, data: bytes) -> None:
        answer = door.raw(data)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 ")), answer
        assert b"Content-Type: application/json\r\n" in head
        assert json.loads(body)["error"]["code"] == "bad_request"

    def test_none_is_left_open(self, door: ServedDoor) -> None:
        door.until(lambda stats: stats["http"]["connections"] == 0)


class TestMessages:
    def test_an_acknowledgement_and_an_answer_at_the_hook(self, door: ServedDoor, hook: HttpHook) -> None:
        reply = door.post(request("m-1", "add", f"http://127.0.0.1:{hook.port}/r?x=1", [1, 2]))
        assert reply.status == 200
        assert reply.headers["Content-Type"] == "application/json"
        assert reply.body == b'{"error":"","id":"m-1","result":null,"streamURL":null}'
        path, answer = hook.next()
        assert path == "/r?x=1"
        assert answer == {"error": "", "id": "m-1", "result": 3, "streamURL": None}

    def test_generations(self, door: ServedDoor, hook: HttpHook) -> None:
        url = {"Scheme": "http", "Host": f"127.0.0.1:{hook.port}", "Path": "/g"}
        message = {"id": "g-2", "task": "add", "responsehook": url, "args": [1]}
        reply = door.post(json.dumps(message).encode())
        assert reply.body == b'{"error":"","id":"g-2","result":null,"stream_url":null}'
        assert hook.next() == ("/g", {"error": "", "id": "g-2", "result": 1, "stream_url": None})

    def test_extensions_are_for_those_who_ask(self, door: ServedDoor, hook: HttpHook) -> None:
        url = f"http://127.0.0.1:{hook.port}/"
        assert door.post(request("e-1", "fail", url, ["no"], acomm=1)).json["acomm"] == 1
        assert hook.next()[1]["error_info"]["type"] == "ValueError"
        refusal = door.post(request("e-2", "adds", url, acomm=1)).json
        assert (refusal["id"], refusal["error_info"]["code"]) == ("e-2", "unknown_task")
        assert set(door.post(request("e-3", "adds", url)).json) == {"error", "id", "result", "streamURL"}

    @pytest.mark.parametrize("host", ["", "localhost", "127.9.9.9", "LocalHost"])
    @pytest.mark.parametrize("form", ["text", "object"])
    def test_a_hook_at_the_callers_own_host(
        self, door: ServedDoor, hook: HttpHook, host: str, form: str
    ) -> None:
        """As the original's command line sends it: `http://:4080/response`."""
        url: Any = f"http://{host}:{hook.port}/response"
        if form == "object":
            url = {"Scheme": "http", "Host": f"{host}:{hook.port}", "Path": "/response"}
        id = os.urandom(4).hex()
        assert door.post(request(id, "add", url, [2])).json["error"] == ""
        path, answer = hook.next()
        assert (path, answer["id"], answer["result"]) == ("/response", id, 2)

    def test_a_request_of_our_own_spelling_with_such_a_hook(self, door: ServedDoor, hook: HttpHook) -> None:
        message = request("own-1", "add", f"http://:{hook.port}/o", [3], acomm=1)
        assert door.post(message.replace(b": ", b":").replace(b", ", b",")).json["error"] == ""
        assert hook.next()[1]["id"] == "own-1"

    def test_a_unix_hook_of_the_services_user_by_who_shows_the_token(
        self, door: ServedDoor, tmp_path: Path
    ) -> None:
        with Hook(tmp_path / "h.sock") as hook:
            assert door.post(request("u-1", "add", hook.url, [4])).json["error"] == ""
            assert hook.answer()["result"] == 4

    @pytest.mark.parametrize(
        ("message", "id", "said"),
        [
            (b"hello", "", "not a JSON object"),
            (b"", "", "not a JSON object"),
            (b"null", "", "not a JSON object"),
            (b'{"id":"r-1"}', "r-1", "missing task"),
            (b'{"id":"r-2","task":"add","args":[1]}', "r-2", "missing response hook"),
            (b'{"task":"add","responseHook":null}', "", "missing id"),
            (request("r-3", "adds"), "r-3", "did you mean add?"),
            (request("r-4", "add", None, ["x"]), "r-4", "expected int, got str"),
            (request("r-5", "add", "http://10.0.0.1/"), "r-5", "10.0.0.1"),
            (request("r-6", "add", "http://127.0.0.1:4321/"), "r-6", "127.0.0.1"),
            (request("r-7", "add", "http://169.254.169.254/"), "r-7", "169.254.169.254"),
            (request("r-8", "add", None, [1], handlers={"success": "AAAA"}), "r-8", "own user only"),
        ],
    )
    def test_refusals_are_acknowledgements(
        self, door: ServedDoor, message: bytes, id: str, said: str
    ) -> None:
        reply = door.post(message)
        assert reply.status == 200
        assert set(reply.json) in [{"error", "id", "result", key} for key in ("streamURL", "stream_url")]
        assert (reply.json["id"], reply.json["result"]) == (id, None)
        assert said in reply.json["error"]

    def test_hooks_that_never_answer_hold_up_no_other(self, tmp_path: Path, hook: HttpHook) -> None:
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2048:
            pytest.skip("this needs more descriptors than there are")
        with contextlib.ExitStack() as stack, ServedDoor(tmp_path, "--allow-hook", "127.0.0.1:*") as door:
            for number in range(9):
                hole = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
                url = f"http://127.0.0.1:{hole.getsockname()[1]}/"
                for n in range(32):
                    assert door.post(request(f"{number}-{n}", "add", url, [1])).json["error"] == ""
            door.until(lambda stats: stats["hooks"]["pending"] == 9 * 32)
            url = f"http://127.0.0.1:{hook.port}/"
            assert door.post(request("good", "add", url, [1])).json["error"] == ""
            assert hook.next()[1]["id"] == "good"

    def test_a_conflict(self, door: ServedDoor, hook: HttpHook) -> None:
        url = f"http://127.0.0.1:{hook.port}/"
        assert door.post(request("twice", "add", url, [1])).json["error"] == ""
        hook.next()
        assert "was used for another request" in door.post(request("twice", "add", url, [2])).json["error"]
        assert door.post(request("twice", "add", url, [1])).json["error"] == ""
        assert hook.next()[1]["result"] == 1

    def test_a_repeat_is_answered_with_a_stream_that_its_hook_can_read(
        self, short_folder: Path, hook: HttpHook
    ) -> None:
        allowed = ("--allow-hook", f"127.0.0.1:{hook.port}")
        with ServedDoor(short_folder, "-w", "1", *allowed, modules=("streamtasks",)) as door:
            message = request("again", "count", f"http://127.0.0.1:{hook.port}/", [3])
            for _ in range(2):
                assert door.post(message).json["error"] == ""
                url = hook.next()[1]["streamURL"]
                assert (url["Scheme"], url["Path"]) == ("http", "/stream")
            assert door.get(f"/stream?{url['RawQuery']}", token=False).body == b"0\n1\n2\n"

    @pytest.mark.parametrize(
        ("headers", "code", "said"),
        [
            ({}, "forbidden", "token"),
            ({"Authorization": "Bearer wrong"}, "forbidden", "token"),
            ({"Host": "evil.example.org"}, "forbidden", "does not answer to the host evil.example.org"),
            ({"Origin": "https://evil.example.org"}, "forbidden", "pages of https://evil.example.org"),
            ({"Content-Type": "text/plain"}, "bad_request", "Content-Type"),
        ],
    )
    def test_who_is_not_let_in_is_told_in_the_body(
        self, door: ServedDoor, headers: dict[str, str], code: str, said: str
    ) -> None:
        given = {**JSON, **(door.headers() if headers and "Authorization" not in headers else {}), **headers}
        reply = door.send("POST", "/", request("a-1", "add", None, [1]), given)
        assert reply.status == 200
        assert reply.json["result"] is None
        assert said in reply.json["error"]
        assert reply.json["error_info"]["code"] == code


class TestGate:
    @pytest.mark.parametrize("shown", [None, "Bearer x", "Basic x", "Bearer "])
    @pytest.mark.parametrize(("method", "path"), [("POST", "/call/add"), ("GET", "/openapi.json")])
    def test_without_the_token(self, door: ServedDoor, method: str, path: str, shown: str | None) -> None:
        headers = {**JSON, **({} if shown is None else {"Authorization": shown})}
        reply = door.send(method, path, b"[1]" if method == "POST" else None, headers)
        assert (reply.status, reply.error["code"]) == (401, "forbidden")
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert SECURITY.items() <= reply.headers.items()

    def test_the_token_in_the_url_is_no_use(self, door: ServedDoor) -> None:
        assert door.call("add", [1], query=f"?token={door.token}", token=False).status == 401

    @pytest.mark.parametrize("path", ["/healthz", "/readyz"])
    def test_probes_need_none(self, door: ServedDoor, path: str) -> None:
        reply = door.get(path, token=False)
        assert (reply.status, reply.body) == (200, b"ok\n" if path == "/healthz" else b"ready\n")
        assert SECURITY.items() <= reply.headers.items()
        assert door.send("HEAD", path).status == 200

    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("localhost", 200),
            ("localhost:1", 200),
            ("127.0.0.1", 200),
            ("API.example.org:8443", 200),
            ("evil.example.org", 403),
            ("127.0.0.1.nip.io", 403),
            ("10.0.0.1", 403),
            ("", 403),
        ],
    )
    @pytest.mark.parametrize("path", ["/healthz", "/call/add", "/stream", "/proxy"])
    def test_hosts(self, door: ServedDoor, host: str, status: int, path: str) -> None:
        headers = {**JSON, **door.headers(), "Host": host}
        if path in ("/call/add", "/proxy"):
            reply = door.send("POST", path, b"[1]", headers)
        else:
            reply = door.send("GET", path, None, headers)
        if path == "/stream" and status == 200:
            status = 403  # it is not signed, which is another story
            assert b"not signed" in reply.body
        elif status == 403:
            assert "does not answer to the host" in reply.error["message"]
        assert reply.status == status

    def test_no_host_at_all(self, door: ServedDoor) -> None:
        assert b" 403 " in door.raw(b"GET /healthz HTTP/1.0\r\n\r\n").split(b"\r\n")[0]

    @pytest.mark.parametrize("path", ["/call/add", "/proxy"])
    def test_pages_of_others(self, door: ServedDoor, path: str) -> None:
        body = request("p", "add")
        for origin in (
            "https://evil.example.org",
            "null",
            "http://localhost:1",
            f"http://localhost:{door.port}",
        ):
            reply = door.send("POST", path, body, {**JSON, **door.headers(Origin=origin)})
            assert (reply.status, reply.error["code"]) == (403, "forbidden"), origin
        own = {**JSON, **door.headers(Origin=door.http_url)}
        assert door.send("POST", path, b"[1]", own).status == 200

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("GET", "/", "POST"),
            ("GET", "/call/add", "POST"),
            ("PUT", "/call/add", "POST"),
            ("OPTIONS", "/call/add", "POST"),
            ("POST", "/healthz", "GET"),
            ("DELETE", "/stream", "GET"),
            ("GET", "/proxy", "POST"),
        ],
    )
    def test_methods(self, door: ServedDoor, method: str, path: str, allowed: str) -> None:
        reply = door.send(method, path, None, door.headers())
        assert (reply.status, reply.headers["Allow"]) == (405, allowed)
        assert reply.error["code"] == "bad_request"

    @pytest.mark.parametrize("path", ["/nothing", "/call", "/call/", "//", "/healthz/"])
    def test_other_paths(self, door: ServedDoor, path: str) -> None:
        reply = door.send("POST", path, b"{}", {**JSON, **door.headers()})
        assert (reply.status, reply.error["code"]) == (404, "bad_request")

    def test_a_name_in_the_request_line_is_no_way_round(self, door: ServedDoor) -> None:
        for line in (b"GET http://evil.org/healthz", b"CONNECT evil.org:80"):
            answer = door.raw(line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert answer.split(b" ")[1] in (b"404", b"405", b"400"), answer

    def test_without_a_token_anybody_on_this_host_may(self, tmp_path: Path) -> None:
        with ServedDoor(tmp_path, "--http-no-token", "-w", "1") as door:
            assert door.token is None
            assert door.call("add", [1]).json == 1
            assert door.call("add", [1], Host="evil.example.org").status == 403
            with Hook(tmp_path / "h.sock") as hook:  # they are trusted
                assert door.post(request("u-1", "add", hook.url, [4])).json["error"] == ""
                assert hook.answer()["result"] == 4
            assert "securitySchemes" not in door.get("/openapi.json").json["components"]

    def test_a_token_of_the_users_own(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("a-token-of-the-users-own-0123456789\n")
        secret.chmod(0o600)
        with ServedDoor(tmp_path, "--http-token-file", str(secret), "-w", "1") as door:
            assert not (tmp_path / "s.sock.token").exists()
            assert door.call("add", [1]).status == 401
            assert Caller(door.http_url, secret.read_text().strip()).call("add", [1]).json == 1


class TestSizes:
    def test_a_body_that_is_announced_too_large(self, small: ServedDoor) -> None:
        reply = small.call("echo", ["x" * 5000])
        assert (reply.status, reply.error["code"]) == (413, "too_large")
        assert "the limit is 4096" in reply.error["message"]

    def test_one_that_grows_too_large(self, small: ServedDoor) -> None:
        head = http("POST /call/echo", small, None, "Transfer-Encoding: chunked", "Connection: close")
        with small.connect() as sock:
            sock.sendall(head + b"1000\r\n" + b" " * 0x1000 + b"\r\n")
            sock.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
            status, body = read_reply(sock.makefile("rb"))
        assert (status, json.loads(body)["error"]["code"]) == (413, "too_large")

    def test_at_the_root_it_is_told_in_the_body(self, small: ServedDoor) -> None:
        reply = small.post(request("big", "echo", None, ["x" * 5000]))
        assert reply.status == 200
        assert "the limit is 4096" in reply.json["error"]

    def test_one_of_exactly_the_limit(self, small: ServedDoor) -> None:
        assert small.call("add", b"[1" + b" " * 4093 + b"]").json == 1

    def test_a_result_that_is_too_large(self, small: ServedDoor) -> None:
        reply = small.call("echo", ["x" * 4000])
        assert (reply.status, reply.error["code"]) == (413, "too_large")
        assert "result" in reply.error["message"]


class TestMemory:
    """What was refused is gone at once: garbage is looked for seldom, and may hold a message of many MB."""

    def test_of_calls_that_are_refused(self, door: ServedDoor) -> None:
        body = b'{"a":"%b"}' % (b"x" * 4_000_000)
        with not_growing(door):
            for _ in range(40):
                assert door.call("add", body).status == 422

    def test_of_what_is_not_http(self, door: ServedDoor) -> None:
        with not_growing(door):
            for _ in range(800):
                with door.connect() as sock, contextlib.suppress(OSError):
                    sock.sendall(b"GARBAGE\r\n\r\n" + b"x" * 250_000)
                    sock.recv(1000)

    def test_of_messages_that_are_cut(self, door: ServedDoor) -> None:
        data = frame(b"x" * 8_000_000)[:4_000_000]
        with not_growing(door):
            for _ in range(40):
                with connected(door.path) as sock:
                    sock.sendall(data)


@contextlib.contextmanager
def not_growing(door: ServedDoor) -> Iterator[None]:
    """Within, 160 MB are sent in vain, of which a few are there at a time."""
    process = psutil.Process(door.pid)
    before = process.memory_info().rss
    yield
    assert door.call("add", [1]).json == 1
    assert process.memory_info().rss - before < 60_000_000


class TestLife:
    def test_it_drains(self, tmp_path: Path, started: Fifo, release: Fifo) -> None:
        with ServedDoor(tmp_path) as door:
            answers: list[Any] = []
            calling = threading.Thread(
                target=lambda: answers.append(door.call("hold", [started.path, release.path]))
            )
            calling.start()
            pid = int(started.read())
            door.signal(signal.SIGTERM)
            assert door.notified() == "STOPPING=1"
            refusal = door.call("add", [1])
            assert (refusal.status, refusal.error["code"]) == (503, "shutting_down")
            assert int(refusal.headers["Retry-After"]) >= 1
            assert "stopping" in door.post(request("late", "add", None, [1])).json["error"]
            ready = door.get("/readyz")
            assert (ready.status, ready.body) == (503, b"draining\n")
            assert door.get("/healthz").status == 200
            release.close()
            assert door.wait() == 0
            calling.join(WAIT)
            assert (answers[0].status, answers[0].json) == (200, pid)
            assert "Traceback" not in door.stderr()

    def test_what_does_not_end_in_time_is_answered(self, tmp_path: Path, started: Fifo) -> None:
        with ServedDoor(tmp_path, "--drain-timeout", "0.1") as door:
            answers: list[Any] = []
            calling = threading.Thread(target=lambda: answers.append(door.call("stay", [started.path])))
            calling.start()
            started.read()
            door.signal(signal.SIGTERM)
            assert door.wait() == 0
            calling.join(WAIT)
            assert (answers[0].status, answers[0].error["code"]) == (503, "shutting_down")

    def test_connections_that_are_idle_do_not_keep_it(self, tmp_path: Path) -> None:
        with ServedDoor(tmp_path, "-w", "1") as door, door.connect() as new, door.connect() as used:
            used.sendall(http("POST /call/add", door, b"[1]"))
            file = used.makefile("rb")
            assert read_reply(file) == (200, b"1")
            door.signal(signal.SIGTERM)
            assert door.wait() == 0
            assert (new.recv(1), file.read()) == (b"", b"")

    def test_it_says_where_it_is(self, tmp_path: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "servedtasks", "-w", "1", "--until-eof"],
            env=environment(tmp_path, ACOMM_HTTP="localhost:0", ACOMM_HTTP_NO_TOKEN="true"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"acomm: ready on unix://{tmp_path}/acomm/acomm.sock and http://localhost:")
        url = line.partition(" and ")[2].partition(" ")[0]
        assert Caller(url, None).call("add", [1]).json == 1
        process.communicate(timeout=WAIT)
        assert process.returncode == 0

    def test_over_the_newer_protocol(self, tmp_path: Path) -> None:
        if not has_ipv6():
            pytest.skip("this host has no IPv6 loopback")
        with ServedDoor(tmp_path, "--http", "[::1]:0", "-w", "1") as door:
            assert door.http_url.startswith("http://[::1]:")
            assert door.call("add", [1]).json == 1

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--http", ":8080"], "http needs a host before the port, not :8080"),
            (["--http", "8080"], "http must be HOST:PORT"),
            (["--http", "0.0.0.0:0", "--http-no-token"], "--http-no-token is for loopback addresses alone"),
            (["--http", "127.0.0.1:0", "--http-host", "a b"], "http_host must be NAME"),
            (["--http", "127.0.0.1:0", "--http-url", "ftp://x"], "http_url has an unknown scheme"),
            (["--http", "127.0.0.1:0", "--http-token-file", "/dev/null"], "is not a plain file"),
            (["--http", "192.0.2.1:0"], "cannot listen at http://192.0.2.1:0"),
            (["--http-url", "http://x"], "http_url is given, but no http"),
            (["--http-token-file", "x"], "http_token_file is given, but no http"),
            (["--http-no-token"], "http_no_token is given, but no http"),
            (["--http-host", "x"], "http_host is given, but no http"),
        ],
    )
    def test_settings_that_do_not_fit(self, tmp_path: Path, arguments: list[str], said: str) -> None:
        done = start(tmp_path, *arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and said in done.stderr

    def test_a_port_that_is_taken(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            done = start(tmp_path, "--http", f"127.0.0.1:{port}")
        assert done.returncode == 2
        assert done.stderr == f"acomm: cannot listen at http://127.0.0.1:{port}: the port is in use\n"
        assert not (tmp_path / "s.sock").exists()

    def test_launch_passes_the_settings_on(self, tmp_path: Path) -> None:
        secret = tmp_path / "token"
        settings = {
            "http": "127.0.0.1:0",
            "http_token_file": str(secret),
            "http_host": ("api.example.org",),
            "http_url": "https://api.example.org/x",
        }
        with launch("servedtasks", workers=1, **settings) as client:
            caller = Caller(client.stats()["http"]["url"], secret.read_text().strip())
            assert caller.call("add", [1], Host="api.example.org").json == 1
        with launch("servedtasks", workers=1, http="127.0.0.1:0", http_no_token=True) as client:
            assert Caller(client.stats()["http"]["url"], None).call("add", [1]).json == 1
        with pytest.raises(ConfigError):
            with launch("servedtasks", workers=1, http="nowhere"):
                pass

    def test_workers_know_no_http(self, tmp_path: Path) -> None:
        (tmp_path / "loaded.py").write_text(
            "import sys\nfrom workers import task\n"
            "@task\ndef loaded() -> bool:\n    return 'aiohttp' in sys.modules\n"
        )
        with ServedDoor(tmp_path, "-w", "1", modules=("loaded.py",)) as door:
            assert door.call("loaded").json is False
        code = "import sys, workers, workers.supervisor; sys.exit('aiohttp' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], timeout=WAIT, check=False).returncode == 0


def http(line: str, caller: Caller, body: bytes | None = b"", *headers: str) -> bytes:
    """A request as bytes, with the caller's token."""
    lines = [f"{line} HTTP/1.1", f"Host: 127.0.0.1:{caller.port}", *headers]
    lines += [f"{name}: {value}" for name, value in {**JSON, **caller.headers()}.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def read_reply(file: Any) -> tuple[int, bytes]:
    """Status and body of the next reply, which has a length."""
    status = int(file.readline().split()[1])
    length = None
    while line := file.readline().strip():
        name, _, value = line.partition(b": ")
        if name == b"Content-Length":
            length = int(value)
    assert length is not None
    return status, file.read(length)


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A supervisor that is expected not to start."""
    return subprocess.run(
        serve_command(folder / "s.sock", *arguments),
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
