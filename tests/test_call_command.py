"""`acomm call`: streams in and out, progress, and coordinators of the original."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, GoPeer, Peer, ack, answering, url_object
from serving import Fifo, Served, environment

import acomm
from acomm.calls import Progress
from workers.calling import SHOWN_LINES, describe, shown

pytestmark = pytest.mark.process

PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
ACOMM = (sys.executable, "-c", "from workers.cli import main; main()")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("command"), modules=("calledtasks",)) as served:
        yield served


class Command:
    def __init__(self, served: Served, folder: Path) -> None:
        self.served = served
        self.environment = environment(folder, ACOMM_URL=served.url)

    def __call__(self, *arguments: str, status: int = 0, **more: Any) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [*ACOMM, "call", *arguments],
            env=self.environment,
            capture_output=True,
            timeout=60,
            **({} if "input" in more else {"stdin": subprocess.DEVNULL}),
            **more,
        )
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr
        return done

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*ACOMM, "call", *arguments], env=self.environment, **options)


@pytest.fixture
def call(served: Served, tmp_path: Path) -> Command:
    return Command(served, tmp_path)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "marker")
    yield fifo
    fifo.close()


class TestStreams:
    def test_lines_as_they_are(self, call: Command) -> None:
        expected = b'{"number":0,"square":0}\n{"number":1,"square":1}\n'
        for options in ((), ("--stream",)):
            done = call("squares", "2", *options)
            assert (done.stdout, done.stderr) == (expected, b"")

    def test_bytes(self, call: Command) -> None:
        assert call("letters", '"abc"', "--stream").stdout == b"abc"
        assert call("letters", '"abc"').stdout == b"abc"

    def test_an_answer_that_is_none(self, call: Command) -> None:
        done = call("add", "1", "--stream", status=1)
        assert (done.stdout, done.stderr) == (b"", b"acomm: the answer of add is no stream\n")

    def test_one_that_breaks(self, call: Command) -> None:
        done = call("breaks", "2", status=1)
        assert done.stdout == b"0\n1\n"
        assert done.stderr.startswith(b"acomm: the stream unix://")
        assert len(done.stderr.splitlines()) == 1

    def test_a_reader_that_leaves(self, served: Served, call: Command, marker: Fifo) -> None:
        command = call.start(
            "endless",
            json.dumps(marker.path),
            **PIPES,
        )
        assert command.stdout is not None
        assert command.stdout.readline() == b"0\n"
        command.stdout.close()
        assert marker.read()
        assert command.stderr is not None
        assert command.stderr.read() == b""
        assert command.wait(WAIT) == 141
        command.stderr.close()

    def test_an_interrupt_stops_the_task(self, call: Command, marker: Fifo) -> None:
        command = call.start(
            "endless",
            json.dumps(marker.path),
            **PIPES,
        )
        assert command.stdout is not None
        command.stdout.readline()
        command.send_signal(signal.SIGINT)
        _, stderr = command.communicate(timeout=WAIT)
        assert (command.returncode, stderr) == (130, b"")
        assert marker.read()

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
    def test_a_full_disk(self, call: Command) -> None:
        with open("/dev/full", "wb") as full:
            command = call.start("squares", "2", stdout=full, stderr=subprocess.PIPE)
            _, stderr = command.communicate(timeout=WAIT)
        assert command.returncode == 1
        assert stderr == b"acomm: the output cannot be written: No space left on device\n"

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
    @pytest.mark.parametrize("arguments", [("call", "add", "1"), ("tasks",), ("stats", "--json")], ids=str)
    def test_a_full_disk_for_what_is_no_stream(self, call: Command, arguments: tuple[str, ...]) -> None:
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*ACOMM, *arguments], env=call.environment, stdout=full, stderr=subprocess.PIPE, timeout=WAIT
            )
        assert done.returncode == 1
        assert done.stderr == b"acomm: the output cannot be written: No space left on device\n"


class TestInput:
    def test_a_file_and_stdin(self, call: Command, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"one\ntwo\n")
        assert call("lines_upper", "--input", str(tmp_path / "file")).stdout == b'"ONE"\n"TWO"\n'
        assert call("lines_upper", "--input", "-", input=b"three\n").stdout == b'"THREE"\n'

    def test_both_ways_as_they_come(self, call: Command) -> None:
        command = call.start("lines_upper", "--input", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert command.stdin is not None
        assert command.stdout is not None
        for word in (b"one", b"two"):
            command.stdin.write(word + b"\n")
            command.stdin.flush()
            assert command.stdout.readline() == b'"%b"\n' % word.upper()
        command.stdin.close()
        assert command.stdout.read() == b""
        assert command.wait(WAIT) == 0
        command.stdout.close()

    @pytest.mark.parametrize("name", ["none", "."])
    def test_what_cannot_be_read(self, call: Command, tmp_path: Path, name: str) -> None:
        done = call("digest", "--input", str(tmp_path / name), status=2)
        assert b"cannot be read: " in done.stderr


class TestProgress:
    def test_lines(self, call: Command, started: Fifo, release: Fifo) -> None:
        command = call.start(
            "advance",
            json.dumps([started.path, release.path]),
            "--progress",
            **PIPES,
        )
        assert command.stderr is not None
        lines = iter(command.stderr.readline, b"")
        assert b"running 3 of 10 a third\n" in lines
        release.close()
        stdout, rest = command.communicate(timeout=WAIT)
        assert int(stdout) > 0
        # Between its end and its answer the supervisor takes a call for one that is not running yet.
        assert set(rest.splitlines()) <= {b"queued"}

    def test_a_bar_on_a_terminal(self, call: Command, started: Fifo, release: Fifo) -> None:
        leader, follower = os.openpty()
        call.environment |= {"TERM": "xterm", "COLUMNS": "100"}
        command = call.start(
            "advance",
            json.dumps([started.path, release.path]),
            "--progress",
            stdout=subprocess.PIPE,
            stderr=follower,
        )
        os.close(follower)
        text = b""
        while b"running 3 of 10 a third" not in text:
            text += os.read(leader, 4096)
        release.close()
        stdout, _ = command.communicate(timeout=WAIT)
        assert int(stdout) > 0
        os.close(leader)

    def test_in_words(self) -> None:
        assert describe(None) == ""
        assert describe(Progress()) == ""
        assert describe(Progress(state="queued")) == "queued"
        assert describe(Progress(0.5, None, "so\nfar", "running")) == "running 0.5 so\\nfar"
        assert describe(Progress(0, 3)) == "0 of 3"


class TestReceipts:
    def test_a_lost_call_shows_where_it_was_and_what_it_said(self, call: Command) -> None:
        done = call("crash", r'"bad \u001b[31m word"', status=1)
        first, *rest = done.stderr.decode().splitlines()
        assert first.startswith("acomm: worker ") and first.endswith("ran task crash [worker_lost]")
        assert "was killed by SIGABRT" in first
        assert rest[0] == "its stack, the innermost first:"
        assert "calledtasks.py" in rest[1] and rest[1].endswith(" in crash")
        assert rest[2:] == ["its last words on stderr:", "  bad \\x1b[31m word"]

    @pytest.mark.parametrize("receipt", [{}, {"dump": 5, "stderr": ["x"]}, {"dump": "", "stderr": "\n"}])
    def test_one_that_tells_nothing(self, receipt: dict[str, Any]) -> None:
        assert shown(receipt) == []

    def test_what_is_shown_is_bounded_and_safe(self) -> None:
        lines = shown({"dump": "\x00\n" * 1000, "stderr": "\r\x1b\u2028" * 1000 + "\n\x9b2J" * 1000})
        assert len(lines) == 2 * (SHOWN_LINES + 1)
        assert all(line.isprintable() and len(line) < 3000 for line in lines)

    def test_of_many_threads_the_current_one_is_shown(self) -> None:
        dump = (
            'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in other\n\n'
            'Current thread 0x2 (most recent call first):\n  File "b.py", line 2 in task\n'
            '  File "/x/workers/worker.py", line 3 in run\n\nExtension modules: zmq\n'
        )
        assert shown({"dump": dump})[1:] == ['  File "b.py", line 2 in task']


class TestWait:
    def test_for_a_supervisor_that_is_away(self, call: Command, tmp_path: Path) -> None:
        url = f"unix://{tmp_path}/s.sock"
        done = call("add", "1", "--url", url, "--wait", "0.1", status=1)
        assert done.stderr.endswith(b"No such file or directory (for 0.1 s) [connection_lost]\n")
        command = call.start("add", "1", "--url", url, "--wait", "20", stdout=subprocess.PIPE)
        with Served(tmp_path):
            assert command.communicate(timeout=WAIT)[0] == b"1\n"
        for wait in ("-1", "nan", "inf"):
            assert b"--wait must be" in call("add", "--wait", wait, status=2).stderr


class TestCoordinators:
    """As the original's: no grant, no `acomm` in what they say. Its providers run their task whatever the
    name, so nothing must be asked of them but the task; a request without one is refused unrun.
    """

    def refusing(self, tmp_path: Path, error: str) -> GoPeer:
        def refuse(message: dict[str, Any]) -> str:
            return error if not message["task"] else ""

        def answer(message: dict[str, Any]) -> dict[str, Any]:
            return {"error": "", "id": message["id"], "result": message["args"], "streamURL": None}

        return answering(tmp_path, answer, refuse)

    @pytest.mark.parametrize(
        "error", ["no providers available for task", "unable to find a provider", "unknown task"]
    )
    def test_values_are_json_where_they_parse(self, call: Command, tmp_path: Path, error: str) -> None:
        with self.refusing(tmp_path, error) as peer:
            done = call("get", "name=x", "count=3", "yes=true", "text=a b", "--url", peer.url)
            assert json.loads(done.stdout) == {"name": "x", "count": 3, "yes": True, "text": "a b"}
            assert [message["task"] for message in peer.messages] == ["", "get"]

    def test_types_are_asked_for_only_where_it_matters(self, call: Command, tmp_path: Path) -> None:
        with self.refusing(tmp_path, "no") as peer:
            assert json.loads(call("get", "name=x y", "--url", peer.url).stdout) == {"name": "x y"}
            assert json.loads(call("get", "[1, 2]", "--url", peer.url).stdout) == [1, 2]
            assert [message["task"] for message in peer.messages] == ["get", "get"]

    def test_its_errors(self, call: Command, tmp_path: Path) -> None:
        def refuse(message: dict[str, Any]) -> str:
            return "no providers available for task"

        with answering(tmp_path, lambda message: {}, refuse) as peer:
            done = call("get", "a=1", "--url", peer.url, status=1)
            assert done.stderr == b"acomm: no providers available for task\n"

        def answer(message: dict[str, Any]) -> dict[str, Any]:
            return {"error": "it failed", "id": message["id"], "result": None, "streamURL": None}

        with answering(tmp_path, answer) as peer:
            done = call("get", "--url", peer.url, status=1)
            assert done.stderr == b"acomm: it failed\n"

    def test_its_streams(self, call: Command, tmp_path: Path) -> None:
        path = str(tmp_path / "stream.sock")

        def answer(message: dict[str, Any]) -> dict[str, Any]:
            return {"error": "", "id": message["id"], "result": None, "streamURL": url_object(path)}

        with Peer(path, lambda conn: conn.sendall(b"raw\nbytes")), answering(tmp_path, answer) as peer:
            assert call("get", "--stream", "--url", peer.url).stdout == b"raw\nbytes"

    def test_over_http(self, call: Command, tmp_path: Path) -> None:
        """The original's door: status 200 and an acknowledgement as text, whatever it says."""
        seen: list[tuple[str | None, dict[str, Any]]] = []

        class Door(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.headers["Authorization"], message))
                refused = message["task"] == "acomm.tasks"
                body = ack(message["id"], "no providers available for task" if refused else "")
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                if not refused:
                    hook = f"unix://{message['responseHook']['Path']}"
                    acomm.send_sync(hook, acomm.Response(message["id"], message["args"]))

            def log_message(self, *args: Any) -> None:
                pass

        (tmp_path / "token").write_text("secret\n")
        with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            url = f"http://127.0.0.1:{server.server_address[1]}/"
            done = call("get", "a=1", "--url", url, "--token-file", str(tmp_path / "token"))
            assert json.loads(done.stdout) == {"a": 1}
            assert json.loads(call("get", "a=x", "--url", url).stdout) == {"a": "x"}
            server.shutdown()
            thread.join(WAIT)
        assert [(token, message["task"]) for token, message in seen] == [
            ("Bearer secret", "acomm.tasks"),
            ("Bearer secret", "get"),
            (None, "get"),
        ]

    def test_a_token_that_cannot_be_used(self, call: Command, tmp_path: Path) -> None:
        done = call("get", "--token-file", str(tmp_path / "none"), status=2)
        assert done.stderr.startswith(b"acomm: a token is for HTTP")
        done = call("get", "--url", "http://127.0.0.1:1", "--token-file", str(tmp_path / "none"), status=2)
        assert b"cannot be read: No such file" in done.stderr
