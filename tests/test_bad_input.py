"""Whatever comes in, the supervisor says what is wrong with it, and lives on."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, connected, frame, read_all, read_frame
from serving import Fifo, Hook, Served, environment, request

pytestmark = pytest.mark.process

MAX_FRAME = 1_000_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("bad"), "--max-frame", str(MAX_FRAME)) as served:
        yield served


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    with Hook(tmp_path / "hook") as hook:
        yield hook


@pytest.fixture(autouse=True)
def unharmed(served: Served, tmp_path: Path) -> Iterator[None]:
    """After each test, the same process answers a good call, and nothing of the test is left in it."""
    yield
    with Hook(tmp_path / "good") as hook:
        ack = json.loads(served.ask(request(os.urandom(8).hex(), "add", hook.url, [1, 2])))
        assert ack["error"] == ""
        assert hook.answer()["result"] == 3
    assert served.process.poll() is None
    assert "Traceback" not in served.stderr()


def refusal(served: Served, data: bytes) -> dict[str, Any]:
    """What the acknowledgement of a message says, which must be an error, and the connection's end."""
    with connected(served.path) as sock:
        sock.sendall(data)
        answer = json.loads(read_frame(sock))
        assert read_all(sock) == b""
    assert answer["error"]
    assert answer["result"] is None
    return answer


def code_of(served: Served, message: bytes) -> str:
    """The code of the refusal of a message that asks for extensions."""
    with connected(served.path) as sock:
        sock.sendall(frame(message))
        answer = json.loads(read_frame(sock))
    assert answer["error"]
    assert "\n" not in answer["error"]
    assert answer["error"].isprintable()
    code: str = answer["error_info"]["code"]
    return code


class TestFrames:
    def test_an_empty_frame(self, served: Served) -> None:
        assert "empty message" in refusal(served, frame(b""))["error"]

    def test_a_header_that_announces_too_much(self, served: Served) -> None:
        for length in (MAX_FRAME + 1, 0x08FFFFFF, 0xFFFFFFFF):
            answer = refusal(served, length.to_bytes(4, "big") + b"{}")
            assert answer["error"].endswith(f"larger than the limit of {MAX_FRAME} bytes")

    def test_messages_before_an_oversized_one_are_taken(self, served: Served, hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(frame(request("before", "add", hook.url, [1])) + b"\xff\xff\xff\xff")
            assert json.loads(read_frame(sock))["error"] == ""
            assert "limit" in json.loads(read_frame(sock))["error"]
            assert read_all(sock) == b""
        assert hook.answer()["result"] == 1

    def test_a_header_that_announces_more_than_comes(self, served: Served) -> None:
        with connected(served.path) as sock:
            sock.sendall(b"\x00\x00\x00\x64{}")
            sock.shutdown(socket.SHUT_WR)
            assert "2 of 100 bytes" in json.loads(read_frame(sock))["error"]

    def test_a_header_that_announces_less_than_comes(self, served: Served) -> None:
        # The rest is the next header, which announces two gigabytes.
        with connected(served.path) as sock:
            sock.sendall(b"\x00\x00\x00\x02{}" + b'{"id"')
            assert json.loads(read_frame(sock))["error"] == "missing id"
            assert "limit" in json.loads(read_frame(sock))["error"]

    def test_raw_json_beyond_the_limit(self, served: Served) -> None:
        with connected(served.path) as sock:
            try:
                sock.sendall(b'{"id":"' + b"x" * 2 * MAX_FRAME)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
            except (BrokenPipeError, ConnectionResetError):
                pass  # it is not read to its end

    def test_a_web_browser(self, served: Served) -> None:
        with connected(served.path) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert "limit" in json.loads(read_frame(sock))["error"]

    def test_a_peer_that_says_nothing(self, served: Served) -> None:
        with connected(served.path) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b""

    def test_three_megabytes_of_noise(self, served: Served) -> None:
        dice = random.Random(20)
        sent = 0
        while sent < 3_000_000:
            noise = dice.randbytes(dice.choice((1, 4, 17, 1000, 60_000)))
            if dice.random() < 0.5:
                noise = frame(noise)
            sent += len(noise)
            with connected(served.path) as sock:
                try:
                    sock.sendall(noise)
                    sock.shutdown(socket.SHUT_WR)
                    read_all(sock)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it was refused before it was whole

    def test_good_messages_with_wrong_bytes_in_them(self, served: Served, hook: Hook) -> None:
        dice = random.Random(21)
        good = request("fuzz", "add", hook.url, [1, 2], acomm=1, timeout=5, priority=1)
        with connected(served.path) as sock:
            for _ in range(2000):
                bad = bytearray(good)
                for _ in range(dice.randint(1, 3)):
                    place = dice.randrange(len(bad))
                    bad[place : place + dice.randint(0, 2)] = dice.randbytes(dice.randint(0, 2))
                try:
                    sock.sendall(frame(bytes(bad)))
                    json.loads(read_frame(sock))
                except (EOFError, BrokenPipeError, ConnectionResetError):  # one that asks for nothing
                    sock.close()
                    sock = socket.socket(socket.AF_UNIX)
                    sock.settimeout(WAIT)
                    sock.connect(served.path)
            sock.close()


NOT_OBJECTS = {
    "text": b"hello",
    "null": b"null",
    "array": b"[1,2]",
    "string": b'"x"',
    "number": b"7",
    "two objects": b"{}{}",
    "trailing": b"{}x",
    "open": b'{"id":"a"',
    "single quotes": b"{'id':'a'}",
    "comment": b"{} // x",
    "byte order mark": b"\xef\xbb\xbf{}",
    "NUL": b"\x00{}",
    "latin-1 id": b'{"id":"\xe9","task":"add"}',
    "latin-1 args": b'{"id":"a","task":"echo","responseHook":null,"args":["\xe9"]}',
    "surrogate bytes": b'{"id":"a","task":"echo","responseHook":null,"args":["\xed\xa0\x80"]}',
    "half a surrogate pair": b'{"id":"a","task":"echo","responseHook":null,"args":["\\ud800"]}',
    "the other half": b'{"id":"a","task":"echo","responseHook":null,"args":["\\udc00 x"]}',
    "half a surrogate pair in the id": b'{"id":"\\ud800","task":"echo","responseHook":null}',
    "NaN": b'{"id":"a","task":"echo","responseHook":null,"args":[NaN]}',
    "infinity": b'{"id":"a","task":"echo","responseHook":null,"args":[-Infinity]}',
    "deep": b'{"id":"a","task":"echo","responseHook":null,"args":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep unknown": b'{"id":"a","task":"echo","x":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
}


@pytest.mark.parametrize("message", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_what_is_not_a_json_object(served: Served, message: bytes) -> None:
    assert refusal(served, frame(message))["error"].startswith("request is not a JSON object: ")


def good(**fields: Any) -> dict[str, Any]:
    return {
        "id": os.urandom(8).hex(),
        "task": "add",
        "responseHook": None,
        "args": [1],
        "acomm": 1,
        **fields,
    }


FIELDS: dict[str, dict[str, Any]] = {
    "no id": {"id": None},
    "empty id": {"id": ""},
    "id number": {"id": 7},
    "id array": {"id": ["a"]},
    "id NUL": {"id": "a\0b"},
    "id newline": {"id": "a\nb"},
    "id too long": {"id": "x" * 1025},
    "no task": {"task": None},
    "task number": {"task": 1},
    "task object": {"task": {}},
    "task NUL": {"task": "add\0"},
    "task too long": {"task": "x" * 256},
    "hook number": {"responseHook": 7},
    "hook array": {"responseHook": []},
    "hook scheme": {"responseHook": "tcp://localhost:1"},
    "hook file": {"responseHook": "file:///etc/passwd"},
    "hook relative": {"responseHook": "unix://hook"},
    "hook NUL": {"responseHook": "unix:///tmp/a\0b"},
    "hook too long": {"responseHook": "unix:///" + "x" * 107},
    "hook without host": {"responseHook": "http:///x"},
    "hook port": {"responseHook": "http://localhost:99999/"},
    "hook user": {"responseHook": "http://me:secret@localhost/"},
    "hook members": {"responseHook": {"Scheme": "unix", "Path": 7}},
    "hook scheme member": {"responseHook": {"Scheme": "gopher", "Host": "x", "Path": "/"}},
    "hook User text": {"responseHook": {"Scheme": "unix", "User": "x", "Path": "/a"}},
    "taskURL": {"taskURL": 1},
    "streamURL": {"streamURL": "what"},
    "timeout text": {"timeout": "5"},
    "timeout zero": {"timeout": 0},
    "timeout negative": {"timeout": -1},
    "timeout bool": {"timeout": True},
    "priority text": {"priority": "high"},
    "priority fraction": {"priority": 1.5},
    "priority huge": {"priority": 2**31},
    "handlers text": {"handlers": "x"},
    "handlers number": {"handlers": {"success": 1}},
    "handlers of no version": {"handlers": {"success": "gASVBAAAAAAAAABLAS4="}},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_wrong_members(served: Served, fields: dict[str, Any]) -> None:
    assert code_of(served, json.dumps(good(**fields)).encode()) == "bad_request"


RAW: dict[str, tuple[str, str, str]] = {
    "1e999": ('"args":[1]', '"args":[1e999]', "bad_request"),
    "minus 1e999": ('"args":[1]', '"args":[-1e999]', "bad_request"),
    "5000 digits": ('"args":[1]', '"args":[%s]' % ("9" * 5000), "bad_request"),
    "id twice": ('"task"', '"id":"other","task"', "bad_request"),
    "id twice, other case": ('"task"', '"Id":"other","task"', "bad_request"),
    "id twice, escaped": ('"task"', '"\\u0069d":"other","task"', "bad_request"),
    "hooks of two spellings": ('"responseHook"', '"responsehook":null,"responseHook"', "bad_request"),
    "args twice": ('"args"', '"args":[2],"args"', "bad_request"),
    "acomm twice": ('"acomm":1', '"acomm":1,"ACOMM":1', "bad_request"),
    "timeout 1e999": ('"acomm"', '"timeout":1e999,"acomm"', "bad_request"),
    "priority of 5000 digits": ('"acomm"', '"priority":%s,"acomm"' % ("9" * 5000), "bad_request"),
    "unknown key twice": ('"task"', '"x":1,"x":2,"task"', ""),
    "unknown key 1e99": ('"task"', '"x":1e99,"task"', ""),
    "the key of an argument twice": ('"args":[1]', '"args":{"a":1,"a":2}', ""),
}


@pytest.mark.parametrize(("old", "new", "code"), RAW.values(), ids=RAW)
def test_json_that_is_open_to_interpretation(served: Served, old: str, new: str, code: str) -> None:
    text = json.dumps(good(), separators=(",", ":"))
    assert text.count(old) == 1
    message = text.replace(old, new).encode()
    if code:
        assert code_of(served, message) == code
    else:
        with connected(served.path) as sock:
            sock.sendall(frame(message))
            assert json.loads(read_frame(sock))["error"] == ""


def test_generation_2_needs_a_hook(served: Served) -> None:
    message = b'{"id":"h","task":"add","responsehook":null,"args":[1]}'
    assert refusal(served, frame(message))["error"] == "missing response hook"


ARGUMENTS: dict[str, tuple[str, Any]] = {
    "missing": ("add", []),
    "nothing": ("add", None),
    "wrong type": ("add", ["1"]),
    "fraction": ("add", [1.5]),
    "too many": ("add", [1, 2, 3]),
    "unknown keyword": ("add", {"a": 1, "c": 2}),
    "keyword missing": ("add", {"b": 2}),
    "null": ("add", {"a": None}),
    "out of 64 bits": ("add", [[10**30]]),
    "text for an object": ("shift", ["x", 1]),
    "inside an object": ("shift", [{"x": "1"}, 1]),
    "below its bound": ("shift", [{"x": 1}, -1]),
    "not base64": ("reverse", ["?"]),
}


@pytest.mark.parametrize(("task", "args"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_do_not_fit(served: Served, task: str, args: Any) -> None:
    assert code_of(served, json.dumps(good(task=task, args=args)).encode()) == "bad_args"


def test_unknown_tasks(served: Served) -> None:
    assert code_of(served, json.dumps(good(task="ad")).encode()) == "unknown_task"
    assert code_of(served, json.dumps(good(task="../add")).encode()) == "unknown_task"
    assert code_of(served, json.dumps(good(task="servedtasks.add")).encode()) == "unknown_task"
    assert code_of(served, json.dumps(good(task="acomm.shutdown")).encode()) == "unknown_task"
    with connected(served.path) as sock:
        sock.sendall(frame(json.dumps(good(task="ad")).encode()))
        assert json.loads(read_frame(sock))["error"] == "no task ad is served here; did you mean add?"


@pytest.mark.parametrize("args", [None, [], [1], ["a", "b"], {"id": None}, {"id": "a", "x": "b"}, 7])
def test_cancel_wants_one_id(served: Served, args: Any) -> None:
    assert code_of(served, json.dumps(good(task="acomm.cancel", args=args)).encode()) == "bad_args"


class TestRepeatedIds:
    def test_of_an_answered_request(self, served: Served, hook: Hook) -> None:
        message = request("again", "worker_pid", hook.url)
        first = served.ask(message)
        answer = hook.next()
        accepted = served.stats()["counts"]["accepted"]
        assert served.ask(message) == first
        assert hook.next() == answer
        assert served.stats()["counts"]["accepted"] == accepted

    def test_the_answer_is_posted_again_in_the_generation_that_asks_again(
        self, served: Served, hook: Hook
    ) -> None:
        served.ask(request("other-form", "add", hook.url, [1]))
        hook.next()
        message = json.dumps(
            {"id": "other-form", "task": "add", "responsehook": hook.url, "args": [1], "acomm": 1}
        )
        served.ask(message.encode())
        assert hook.next() == frame(b'{"error":"","id":"other-form","result":1,"stream_url":null,"acomm":1}')

    def test_of_one_that_runs(self, served: Served, hook: Hook, tmp_path: Path) -> None:
        started, release = Fifo(tmp_path / "started"), Fifo(tmp_path / "release")
        message = request("running", "hold", hook.url, [started.path, release.path], acomm=1)
        assert json.loads(served.ask(message))["error"] == ""
        pid = int(started.read())
        assert json.loads(served.ask(message))["error"] == ""
        assert code_of(served, request("running", "add", hook.url, [1], acomm=1)) == "conflict"
        assert hook.received.empty()
        release.close()
        assert hook.answer()["result"] == pid
        started.close()

    @pytest.mark.parametrize(
        "other",
        [
            {"task": "echo"},
            {"args": [2]},
            {"args": [1, 0]},
            {"responseHook": None},
            {"responseHook": "unix:///tmp/other"},
        ],
        ids=repr,
    )
    def test_with_other_content(self, served: Served, hook: Hook, other: dict[str, Any]) -> None:
        message = good(id=f"conflict-{other}", responseHook=hook.url)
        served.ask(json.dumps(message).encode())
        assert hook.answer()["result"] == 1
        assert code_of(served, json.dumps({**message, **other}).encode()) == "conflict"

    def test_a_refused_id_is_free_again(self, served: Served, hook: Hook) -> None:
        assert code_of(served, request("free", "add", hook.url, ["x"], acomm=1)) == "bad_args"
        assert json.loads(served.ask(request("free", "add", hook.url, [5])))["error"] == ""
        assert hook.answer()["result"] == 5


class TestHooks:
    def test_one_that_is_not_there_is_tried_again_and_slows_nobody(
        self, served: Served, hook: Hook, tmp_path: Path
    ) -> None:
        late = tmp_path / "late"
        served.ask(request("to-nobody", "add", f"unix://{late}", [1]))
        for number in range(50):
            served.ask(request(f"to-somebody-{number}", "add", hook.url, [number]))
            hook.next()
        assert served.stats()["hooks"]["pending"] >= 1
        with Hook(late) as late_hook:
            assert late_hook.answer()["result"] == 1

    def test_one_that_refuses_is_tried_again(self, served: Served, tmp_path: Path) -> None:
        pending = served.stats()["hooks"]["pending"]
        refusals = iter([b'{"error":"busy","id":"","result":null}', b"null", b"[]", b"junk", b""])
        good_ack = b'{"error":"","id":"","result":null,"streamURL":null}'
        with Hook(tmp_path / "moody", reply=lambda body: next(refusals, good_ack)) as moody:
            served.ask(request("moody", "add", moody.url, [1]))
            messages = {moody.next() for _ in range(6)}
            served.until(lambda stats: stats["hooks"]["pending"] <= pending)
        assert len(messages) == 1


# -- start-up -----------------------------------------------------------------------------------------


def refused_start(folder: Path, *arguments: str, **options: Any) -> str:
    """Start a supervisor that must not start; the one line that it says."""
    options.setdefault("cwd", folder)
    done = subprocess.run(
        [sys.executable, "-m", "workers", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT,
        env=environment(folder),
        **options,
    )
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("acomm: ")
    return lines[0]


MODULES = {
    "syntax": ("def f(:\n", "SyntaxError"),
    "import inside": ("import nothing_of_that_name\n", "nothing_of_that_name"),
    "exit": ("raise SystemExit(0)\n", "SystemExit"),
    "exit with text": ("import sys\nsys.exit('bye')\n", "bye"),
    "error": ("1 / 0\n", "ZeroDivisionError"),
    "no tasks": ("x = 1\n", "no tasks"),
    "two of a name": (
        "from workers import task\n@task(name='a')\ndef f(): pass\n@task(name='a')\ndef g(): pass\n",
        "'?a'?",
    ),
}


@pytest.mark.parametrize(("source", "fault"), MODULES.values(), ids=MODULES)
def test_a_module_that_cannot_be_served(tmp_path: Path, source: str, fault: str) -> None:
    (tmp_path / "faulty.py").write_text(source)
    for name in ("faulty", "faulty.py"):
        line = refused_start(tmp_path, name, "--socket", str(tmp_path / "s"))
        assert "faulty" in line
        if fault != "'?a'?":
            assert fault in line
        else:
            assert "faulty.py:2" in line
            assert "faulty.py:4" in line
    assert not (tmp_path / "s").exists()


def test_no_module(tmp_path: Path) -> None:
    assert "no modules" in refused_start(tmp_path)
    assert "there is no module nowhere" in refused_start(tmp_path, "nowhere")
    assert "there is no file" in refused_start(tmp_path, "nowhere.py")


def test_two_modules_with_a_task_of_one_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("from workers import task\n@task\ndef same(): pass\n")
    line = refused_start(tmp_path, "one", "two")
    assert "one.py:2" in line
    assert "two.py:2" in line


def test_a_module_that_imports_in_the_supervisor_alone(tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(
        "import os\nfrom workers import task\n"
        "if os.path.exists('imported'): raise RuntimeError('only once')\nopen('imported', 'w')\n"
        "@task\ndef f(): pass\n"
    )
    assert "only once" in refused_start(tmp_path, "once", "--socket", str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


class TestSocketPath:
    def test_that_a_live_supervisor_has(self, served: Served, tmp_path: Path) -> None:
        assert "in use by a running service" in refused_start(
            tmp_path, "servedtasks", "--socket", served.path
        )

    def test_that_a_foreign_program_serves(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "s"))
            sock.listen()
            assert "in use" in refused_start(tmp_path, "servedtasks", "--socket", str(tmp_path / "s"))
        assert (tmp_path / "s").exists()

    def test_that_a_killed_supervisor_left(self, tmp_path: Path) -> None:
        with Served(tmp_path) as first:
            first.process.kill()
            first.wait()
            assert stat.S_ISSOCK(os.stat(first.path).st_mode)
        with Served(tmp_path) as second:
            assert json.loads(second.ask(request("a", "add", None, [1])))["error"] == ""

    def test_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "s").write_text("precious")
        line = refused_start(tmp_path, "servedtasks", "--socket", str(tmp_path / "s"))
        assert "not a socket" in line
        assert (tmp_path / "s").read_text() == "precious"

    def test_that_is_too_long(self, tmp_path: Path) -> None:
        line = refused_start(tmp_path, "servedtasks", "--socket", str(tmp_path / ("x" * 108)))
        assert "the kernel takes 107" in line

    def test_in_a_folder_that_others_can_write_to(self, tmp_path: Path) -> None:
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        line = refused_start(tmp_path, "servedtasks", "--socket", str(tmp_path / "open" / "s"))
        assert "others can write" in line

    @pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")
    def test_in_another_users_folder(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, 65534)
        line = refused_start(tmp_path, "servedtasks", "--socket", str(tmp_path / "theirs" / "s"))
        assert "belongs to uid 65534" in line


BAD_OPTIONS: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "workers": lambda folder: ("-w", "0"),
    "max-frame": lambda folder: ("--max-frame", "10"),
    "drain-timeout": lambda folder: ("--drain-timeout", "nan"),
    "allow-uid": lambda folder: ("--allow-uid", "-1"),
    "config": lambda folder: ("--config", str(folder / "missing.toml")),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_settings_that_make_no_sense(tmp_path: Path, option: str) -> None:
    assert option.replace("-", "_") in refused_start(
        tmp_path, "servedtasks", *BAD_OPTIONS[option](tmp_path)
    ).replace("missing.toml", "config")
