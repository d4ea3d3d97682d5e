"""The `acomm` command: what it prints, where, and with what status it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from doors import ServedDoor
from peers import WAIT
from serving import Fifo, Served, environment, serve_command

import acomm
from workers.calling import json_types, read_value
from workers.cli import cli

pytestmark = pytest.mark.process

ACOMM = (sys.executable, "-c", "from workers.cli import main; main()")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("cli")) as served:
        yield served


@pytest.fixture(autouse=True)
def default_url(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACOMM_URL", served.url)


def run(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result


def printed(*arguments: str) -> Any:
    result = run("call", *arguments)
    assert result.stderr == ""
    assert result.stdout.endswith("\n")
    return json.loads(result.stdout)


class TestCall:
    def test_json_arguments(self) -> None:
        assert printed("add", "[1, 2]") == 3
        assert printed("add", '{"a": 1, "b": 2}') == 3
        assert printed("add", "1", "2") == 3
        assert printed("echo") is None
        assert printed("echo", "[[1, 2]]") == [1, 2]
        assert printed("echo", '"é"') == "é"

    def test_the_result_is_one_line_of_json(self) -> None:
        assert run("call", "echo", '[{"a":[1,"x\\n"]}]').stdout == '{"a":[1,"x\\n"]}\n'

    def test_key_value_is_read_by_the_tasks_types(self) -> None:
        assert printed("add", "a=1", "b=2") == 3
        assert printed("text", "value=7") == "'7'"
        assert printed("text", "value=null") == "None"
        assert printed("text", "value=some text") == "'some text'"
        assert printed("text", 'value="quoted"') == "'quoted'"
        assert printed("text", "value=a=b") == "'a=b'"
        assert printed("text", "value=") == "''"
        assert printed("echo", "value=7") == 7
        assert printed("echo", "value=x") == "x"
        assert printed("shift", 'point={"x": 1}', "by=2") == {"x": 3, "y": 2}

    def test_an_error_is_one_line_and_status_1(self) -> None:
        result = run("call", "fail", '"on purpose"', status=1)
        assert (result.stdout, result.stderr) == ("", "acomm: ValueError: on purpose [task_error]\n")
        result = run("call", "fail", '"two\\nlines\\u001b"', status=1)
        assert result.stderr == "acomm: ValueError: two\\nlines\\x1b [task_error]\n"
        assert run("call", "ad", status=1).stderr.endswith("did you mean add? [unknown_task]\n")
        assert run("call", "add", '"x"', status=1).stderr.endswith("[bad_args]\n")
        assert run("call", "add", "a=x", status=1).stderr.endswith("[bad_args]\n")
        assert run("call", "die", '"x"', status=1).stderr.endswith("[worker_lost]\n")

    def test_a_timeout(self, tmp_path: Path) -> None:
        fifo = Fifo(tmp_path / "fifo")
        stderr = run("call", "stay", json.dumps([fifo.path]), "--timeout", "0.2", status=1).stderr
        assert "[timeout]\n" in stderr and stderr.endswith(" in stay\n")
        fifo.close()

    @pytest.mark.parametrize(
        "arguments",
        [
            ("add", "x"),
            ("add", "=1"),
            ("add", "a=1", "a=2"),
            ("add", "1", "b=2"),
            ("add", "1", "--timeout", "0"),
            ("add", "1", "--timeout", "nan"),
            (),
        ],
        ids=str,
    )
    def test_what_it_cannot_read_is_status_2(self, arguments: tuple[str, ...]) -> None:
        result = run("call", *arguments, status=2)
        assert result.stdout == ""
        assert "Error: " in result.stderr

    def test_no_supervisor(self, tmp_path: Path) -> None:
        result = run("call", "add", "1", "--url", f"unix://{tmp_path}/nobody", status=1)
        assert result.stderr.startswith("acomm: cannot reach unix://")
        assert len(result.stderr.splitlines()) == 1

    @pytest.mark.parametrize("command", [("call", "add"), ("tasks",), ("stats",), ("cancel", "1")], ids=str)
    def test_a_url_that_leads_nowhere_is_status_2(self, command: tuple[str, ...]) -> None:
        result = run(*command, "--url", "tcp://x", status=2)
        assert result.stderr.startswith("acomm: the supervisor's URL has an unknown scheme: tcp://x")
        assert len(result.stderr.splitlines()) == 1

    def test_an_interrupted_call_stops_its_task(self, served: Served, tmp_path: Path) -> None:
        fifo = Fifo(tmp_path / "fifo")
        process = subprocess.Popen(
            [*ACOMM, "call", "stay", json.dumps([fifo.path])],
            env=environment(tmp_path, ACOMM_URL=served.url),
            stderr=subprocess.PIPE,
        )
        fifo.read()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT)
        assert (process.returncode, stderr) == (130, b"")
        served.until(lambda stats: stats["tracked"] == 0)
        assert served.stats()["counts"]["cancelled"] == 1
        fifo.close()


class TestReadValue:
    @pytest.mark.parametrize(
        ("text", "schema", "value"),
        [
            ("7", {"type": "integer"}, 7),
            ("7", {"type": "number"}, 7),
            ("7", {"type": "string"}, "7"),
            ("7", {"type": ["string", "integer"]}, 7),
            ("7", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "7"),
            ("7", {"anyOf": [{"type": "string"}, {"type": "number"}]}, 7),
            ("7", {"anyOf": [{"type": "string"}, {}]}, 7),
            ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
            ("null", {"type": "string"}, "null"),
            ("true", {"type": "string"}, "true"),
            ("[1]", {"type": "array"}, [1]),
            ("1e400", {"type": "number"}, "1e400"),
            ("x", {"type": "integer"}, "x"),
            ("1", {"enum": ["1", "2"]}, "1"),
            ("1", {"enum": [1, 2]}, 1),
            ("7", {"$ref": "#/x"}, 7),
            ("7", {}, 7),
            ("7", None, 7),
            ("{", None, "{"),
        ],
    )
    def test_by_schema(self, text: str, schema: dict[str, Any] | None, value: Any) -> None:
        assert read_value(text, schema) == value

    def test_the_types_of_a_schema(self) -> None:
        assert json_types({"anyOf": [{"type": "integer"}, {"enum": ["a"]}]}) == {"integer", "string"}
        assert json_types({"anyOf": []}) is None


class TestOthers:
    def test_tasks(self) -> None:
        lines = dict(line.split("\t", 1) for line in run("tasks").stdout.splitlines())
        assert lines["add"] == "a: integer, [b: integer]\tAdd two numbers."
        assert lines["echo"] == "[value: any]\t"
        assert [task["name"] for task in json.loads(run("tasks", "--json").stdout)] == list(lines)

    def test_stats(self, served: Served) -> None:
        stats = json.loads(run("stats", "--json").stdout)
        assert stats["pid"] == served.pid
        lines = dict(line.split("\t", 1) for line in run("stats").stdout.splitlines())
        assert lines["pid"] == str(served.pid)
        assert lines["state"] == "serving"
        for worker in stats["workers"]:
            assert str(worker["pid"]) in lines

    def test_cancel(self, served: Served, tmp_path: Path) -> None:
        fifo = Fifo(tmp_path / "fifo")
        with acomm.connect(served.url) as client:
            call = client.submit("stay", fifo.path)
            fifo.read()
            assert run("cancel", call.id).output == ""
            with pytest.raises(acomm.errors.CallCancelled):
                call.result(WAIT)
            result = run("cancel", call.id, status=1)
            assert result.stderr == f"acomm: no request {call.id} is under way\n"
        fifo.close()

    @pytest.mark.parametrize("command", [("tasks",), ("stats",), ("cancel", "1")], ids=str)
    def test_nobody_is_waited_for(self, tmp_path: Path, command: tuple[str, ...]) -> None:
        result = run(*command, "--url", f"unix://{tmp_path}/nobody", status=1)
        assert result.stderr == (
            f"acomm: cannot reach unix://{tmp_path}/nobody: No such file or directory [connection_lost]\n"
        )

    def test_over_http(self, tmp_path: Path) -> None:
        with ServedDoor(tmp_path, "-w", "1") as door:
            secret = tmp_path / "shown"
            secret.write_text(door.token or "")
            reach = ("--url", door.http_url, "--token-file", str(secret))
            assert "add\ta: integer" in run("tasks", *reach).stdout
            assert f"url {door.http_url}" in run("stats", *reach).stdout
            assert "no request 1 is under way" in run("cancel", "1", *reach, status=1).stderr
            assert "[forbidden]" in run("tasks", "--url", door.http_url, status=1).stderr

    def test_help_and_version(self) -> None:
        assert "acomm, version" in run("--version").stdout
        for verb in ("", "serve", "call", "tasks", "stats", "cancel", "demo"):
            assert "Usage: " in run(*verb.split(), "-h").stdout

    def test_tables_for_people(self, served: Served, tmp_path: Path) -> None:
        """On a terminal. The command's own terminal is a pseudo one here."""
        leader, follower = os.openpty()
        process = subprocess.Popen(
            [*ACOMM, "tasks"],
            env=environment(tmp_path, ACOMM_URL=served.url, COLUMNS="200", TERM="xterm"),
            stdout=follower,
        )
        os.close(follower)
        text = b""
        try:
            while chunk := os.read(leader, 4096):
                text += chunk
        except OSError:
            pass  # its end, by Linux's way of telling
        os.close(leader)
        assert process.wait(WAIT) == 0
        assert "what it does" in text.decode()
        assert "Add two numbers." in text.decode()


class TestServe:
    def test_python_m_workers_is_acomm_serve(self, tmp_path: Path) -> None:
        helps = [
            subprocess.run(
                [sys.executable, *command, "-h"], env=environment(tmp_path), capture_output=True, timeout=WAIT
            ).stdout
            for command in (("-m", "workers"), (*ACOMM[1:], "serve"))
        ]
        assert helps[0] == helps[1]
        assert b"MODULE" in helps[0]

    def test_it_says_when_it_is_ready_and_where(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text("from workers import task\n@task\ndef f() -> int: return 5\n")
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "mine.py", "-w", "1"],
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        url = f"unix://{tmp_path}/acomm/acomm.sock"
        assert process.stdout.readline() == f"acomm: ready on {url} with 1 worker and 1 task\n"
        with acomm.connect(url) as client:
            assert client.call("f") == 5
        process.terminate()
        assert process.wait(WAIT) == 0
        process.stdout.close()

    def test_with_nobody_to_tell(self, tmp_path: Path) -> None:
        """Its stdout is a pipe that nobody reads any more."""
        read, write = os.pipe()
        os.close(read)
        process = subprocess.Popen(
            serve_command(tmp_path / "s", "--until-eof"),
            env=environment(tmp_path),
            stdin=subprocess.PIPE,
            stdout=write,
            stderr=subprocess.PIPE,
        )
        os.close(write)
        _, stderr = process.communicate(timeout=WAIT)  # closes its stdin, which ends it when it is ready
        assert process.returncode == 0, stderr
        assert b"Traceback" not in stderr

    def test_settings_from_everywhere(self, tmp_path: Path) -> None:
        (tmp_path / "acomm.toml").write_text('workers = 3\nmodules = ["servedtasks"]\nmax_frame = 20000\n')
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "--config", "acomm.toml", "-w", "1"],
            cwd=tmp_path,
            env=environment(tmp_path, ACOMM_MAX_FRAME="30000", ACOMM_SOCKET=str(tmp_path / "env.sock")),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert f"unix://{tmp_path}/env.sock with 1 worker" in process.stdout.readline()
        with acomm.connect(f"unix://{tmp_path}/env.sock") as client:
            assert client.call("echo", "x" * 25_000)
            with pytest.raises(acomm.AcommError):
                client.using(timeout=WAIT).call("echo", "x" * 35_000)
        process.terminate()
        assert process.wait(WAIT) == 0
        process.stdout.close()

    @pytest.mark.parametrize("stdin", [subprocess.DEVNULL, "file"])
    def test_until_the_end_of_what_has_none(self, tmp_path: Path, stdin: Any) -> None:
        (tmp_path / "file").write_text("x")
        with open(tmp_path / "file") as file:
            done = subprocess.run(
                serve_command(tmp_path / "s", "--until-eof"),
                env=environment(tmp_path),
                stdin=file if stdin == "file" else stdin,
                capture_output=True,
                timeout=WAIT,
            )
        assert done.returncode == 2
        assert done.stderr.decode().splitlines() == [
            "acomm: --until-eof needs a pipe or a terminal as standard input"
        ]
