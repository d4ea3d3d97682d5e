"""Provider sockets: where a coordinator of the Go original finds our tasks, when, and for what."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, GoPeer, ack, connected, frame, read_frame
from serving import Fifo, Hook, Served, environment, request

from acomm.socketpath import check_folder
from workers import launch
from workers.config import Config
from workers.errors import ConfigError
from workers.provider import Provider, socket_path

as_root = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
NOBODY = 65534


def coordinate(folder: Path, message: bytes) -> tuple[list[str], dict[str, Any] | None]:
    """What a coordinator does with a request: lists the task's folder, tries what is a socket there in text
    order, one frame a connection, until one acknowledges without an error. The names tried and the last
    acknowledgement.
    """
    tried: list[str] = []
    last = None
    place = folder / json.loads(message)["task"]
    for path in sorted(place.iterdir(), key=lambda path: path.name):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            continue
        tried.append(path.name)
        try:
            with connected(str(path)) as sock:
                sock.sendall(frame(message))
                last = json.loads(read_frame(sock))
        except (ConnectionError, EOFError):
            continue
        if last["error"] == "":
            break
    return tried, last


def sockets(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_socket())


class TestPaths:
    def test_it_is_the_originals(self) -> None:
        assert socket_path("/run/cerana", "CPUInfo", 50, "metrics") == "/run/cerana/CPUInfo/50-metrics.sock"

    def test_a_relative_folder_is_made_absolute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir("/tmp")
        assert socket_path("c", "add", 7, "a") == "/tmp/c/add/7-a.sock"

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "a/b", "../x", "a\0b", "a b", "naïve", "50%", "a#b", "a?b", "a\n"]
    )
    def test_names_that_no_coordinator_reaches(self, name: str) -> None:
        with pytest.raises(ConfigError, match="provider_name") as caught:
            socket_path("/c", "add", 50, name)
        assert str(caught.value).isprintable()
        with pytest.raises(ConfigError, match=r"the task .*@task") as caught:
            socket_path("/c", name, 50, "a")
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("folder", ["", "/tmp/a b", "/tmp/\0", "/tmp/é"])
    def test_folders_that_no_coordinator_reaches(self, folder: str) -> None:
        with pytest.raises(ConfigError, match="provider_dir"):
            socket_path(folder, "add", 50, "a")

    @pytest.mark.parametrize("task", ["coordinator", "response", "streams"])
    def test_the_coordinators_own_folders(self, task: str) -> None:
        with pytest.raises(ConfigError, match=f"the task {task} .*another one"):
            socket_path("/c", task, 50, "a")
        assert socket_path("/c", "add", 50, task) == f"/c/add/50-{task}.sock"

    def test_a_path_is_as_long_as_the_kernel_takes_it(self) -> None:
        folder = "/" + "d" * (107 - len("//add/50-a.sock"))
        assert len(socket_path(folder, "add", 50, "a")) == 107
        with pytest.raises(ConfigError, match=r"task add is 108 bytes long.*shorter provider_dir"):
            socket_path(folder, "add", 50, "ab")


class TestSettings:
    def test_none_unless_asked_for(self) -> None:
        assert Provider.of(Config(), ["add"], lambda path, task: pytest.fail("a listener was made")) is None

    @pytest.mark.parametrize(("given", "missing"), [("provider_dir", "name"), ("provider_name", "dir")])
    def test_both_or_neither(self, given: str, missing: str) -> None:
        config = Config.load({given: "x"}, environ={})
        with pytest.raises(ConfigError, match=f"provider_{missing}"):
            Provider.of(config, ["add"], lambda path, task: pytest.fail("a listener was made"))

    @pytest.mark.parametrize("priority", [-1, 1.5, "first", 10**10])
    def test_bad_priorities(self, priority: Any) -> None:
        with pytest.raises(ConfigError, match="provider_priority"):
            Config.load({"provider_priority": priority}, environ={})


class TestFolders:
    def test_what_is_made_has_the_mode_asked_for_less_the_umask(self, tmp_path: Path) -> None:
        old = os.umask(0o027)
        try:
            check_folder(str(tmp_path / "a/b"), 0o755)
            check_folder(str(tmp_path / "a/c"))
        finally:
            os.umask(old)
        assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/c")] == [
            0o750,
            0o750,
            0o700,
        ]


def serve(folder: Path, provider_dir: Path, *arguments: str, name: str = "py") -> Served:
    folder.mkdir()
    return Served(folder, "--provider-dir", str(provider_dir), "--provider-name", name, *arguments)


def refused(folder: Path, *arguments: str, modules: tuple[str, ...] = ("servedtasks",)) -> str:
    """What a supervisor that cannot start says."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "workers",
            *modules,
            "--socket",
            str(folder / "r.sock"),
            "-w",
            "1",
            *arguments,
        ],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("acomm: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cerana") / "c"


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served") / "s", folder) as served:
        yield served


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    with Hook(tmp_path / "hook") as hook:
        yield hook


@pytest.mark.process
class TestServing:
    def test_a_coordinator_finds_each_task(self, served: Served, folder: Path) -> None:
        tasks = {task["name"] for task in served.verb("acomm.tasks")}
        assert sockets(folder) == sorted(f"{task}/50-py.sock" for task in tasks)
        modes = [
            stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "add", folder / "add/50-py.sock")
        ]
        assert modes == [0o700, 0o700, 0o600]

    def test_a_request_is_answered_at_its_hook(self, served: Served, folder: Path, hook: Hook) -> None:
        tried, answer = coordinate(folder, request("p-1", "add", hook.url, {"a": 1, "b": 2}))
        assert tried == ["50-py.sock"]
        assert answer == {"error": "", "id": "p-1", "result": None, "streamURL": None}
        assert hook.answer() == {"error": "", "id": "p-1", "result": 3, "streamURL": None}

    @pytest.mark.parametrize("task", ["echo", "acomm.stats", "nowhere"])
    def test_no_other_task_is_served_at_a_tasks_socket(
        self, served: Served, folder: Path, hook: Hook, task: str
    ) -> None:
        with connected(str(folder / "add/50-py.sock")) as sock:
            sock.sendall(frame(request("p-2", task, hook.url)))
            answer = json.loads(read_frame(sock))
        assert answer["id"] == "p-2"
        assert "no task but add" in answer["error"]
        assert hook.connections == 0

    def test_generation_1_is_told_at_its_hook(self, served: Served, folder: Path, tmp_path: Path) -> None:
        with Hook(tmp_path / "raw", raw=True) as hook:
            for id, task, args in (("g-1", "add", [1, 2]), ("g-2", "echo", [1])):
                with connected(str(folder / "add/50-py.sock")) as sock:
                    message = {"id": id, "task": task, "responsehook": hook.url, "args": args}
                    sock.sendall(json.dumps(message).encode())
                    sock.shutdown(socket.SHUT_WR)
                    assert sock.recv(1) == b""
            answers = {answer["id"]: answer for answer in (json.loads(hook.next()) for _ in range(2))}
        assert answers["g-1"]["result"] == 3
        assert "no task but add" in answers["g-2"]["error"]

    def test_a_live_socket_is_an_error_that_takes_nothing_away(
        self, served: Served, folder: Path, tmp_path: Path, hook: Hook
    ) -> None:
        before = sockets(folder)
        line = refused(tmp_path, "--provider-dir", str(folder), "--provider-name", "py")
        assert "50-py.sock is in use" in line
        assert sockets(folder) == before
        coordinate(folder, request("p-3", "add", hook.url, [1, 2]))
        assert hook.answer()["result"] == 3

    def test_its_connections_are_counted(self, served: Served, folder: Path) -> None:
        with connected(str(folder / "add/50-py.sock")):
            served.until(lambda stats: stats["connections"] > 1)


@pytest.mark.process
class TestLife:
    def test_draining_takes_the_sockets_away_first_and_the_end_leaves_nothing(
        self, tmp_path: Path, started: Fifo, release: Fifo, hook: Hook
    ) -> None:
        folder = tmp_path / "c"
        with serve(tmp_path / "s", folder) as served:
            with connected(str(folder / "add/50-py.sock")) as before:
                coordinate(folder, request("p-1", "hold", hook.url, [started.path, release.path]))
                started.read()
                served.signal(signal.SIGTERM)
                assert served.notified() == "STOPPING=1"
                assert sockets(folder) == []
                # Whoever has connected, or has listed the folder before, is sent on.
                before.sendall(frame(request("p-2", "add", hook.url, [1, 2])))
                assert "stopping" in json.loads(read_frame(before))["error"]
                release.close()
                assert hook.answer()["id"] == "p-1"
            assert served.wait() == 0
        assert [path for path in folder.rglob("*") if not path.is_dir()] == []

    def test_what_a_killed_provider_left_is_taken_over(self, tmp_path: Path, hook: Hook) -> None:
        folder = tmp_path / "c"
        with serve(tmp_path / "s", folder) as served:
            served.signal(signal.SIGKILL)
            served.wait()
            left = sockets(folder)
            assert "add/50-py.sock" in left
            tried, answer = coordinate(folder, request("p-1", "add", hook.url, [1, 2]))
            assert (tried, answer) == (["50-py.sock"], None)
        with serve(tmp_path / "t", folder):
            assert sockets(folder) == left
            coordinate(folder, request("p-2", "add", hook.url, [1, 2]))
            assert hook.answer()["result"] == 3

    def test_a_coordinator_goes_from_one_provider_to_the_next_in_text_order(
        self, tmp_path: Path, hook: Hook
    ) -> None:
        folder = tmp_path / "c"
        (folder / "add").mkdir(parents=True)
        busy = lambda message: ack(message["id"], "busy")  # noqa: E731
        with (
            GoPeer(folder / "add/100-go.sock", busy) as first,
            GoPeer(folder / "add/9-go.sock", busy) as last,
            serve(tmp_path / "s", folder) as served,
        ):
            tried, _ = coordinate(folder, request("p-1", "add", hook.url, [1, 2]))
            assert tried == ["100-go.sock", "50-py.sock"]
            assert hook.answer()["result"] == 3
            assert (len(first.messages), len(last.messages)) == (1, 0)
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
            tried, _ = coordinate(folder, request("p-2", "add", hook.url, [1, 2]))
            assert tried == ["100-go.sock", "9-go.sock"]

    def test_the_priority_is_in_the_name(self, tmp_path: Path) -> None:
        with serve(tmp_path / "s", tmp_path / "c", "--provider-priority", "7", name="a-1"):
            assert "add/7-a-1.sock" in sockets(tmp_path / "c")

    def test_launch_passes_the_settings_on(self, tmp_path: Path, hook: Hook) -> None:
        folder = tmp_path / "c"
        settings = {"provider_dir": folder, "provider_name": "py", "provider_priority": 8}
        with launch("servedtasks", workers=1, **settings):  # type: ignore[arg-type]
            coordinate(folder, request("p-1", "add", hook.url, [1, 2]))
            assert hook.answer()["result"] == 3
            assert "add/8-py.sock" in sockets(folder)
        assert sockets(folder) == []

    @as_root
    def test_a_coordinator_of_another_user(self, folder_for_all: Path) -> None:
        folder = folder_for_all / "c"
        asking = (
            "import os, socket, sys\n"
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
            "folder, message = sys.argv[1:]\n"
            "(name,) = [name for name in os.listdir(folder) if name.endswith('.sock')]\n"
            "sock = socket.socket(socket.AF_UNIX)\n"
            f"sock.settimeout({WAIT})\n"
            "sock.connect(os.path.join(folder, name))\n"
            "sock.sendall(len(message).to_bytes(4, 'big') + message.encode())\n"
            "print(sock.recv(65536)[4:].decode())\n"
        )
        with serve(folder_for_all / "s", folder, "--allow-uid", str(NOBODY)):
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    asking,
                    str(folder / "add"),
                    request("p-1", "add", None, [1, 2]).decode(),
                ],
                capture_output=True,
                text=True,
                timeout=WAIT,
                check=True,
            )
            assert json.loads(done.stdout)["error"] == ""


@pytest.mark.process
class TestWhatCannotBeServed:
    def test_without_a_name(self, tmp_path: Path) -> None:
        assert "needs a provider_name" in refused(tmp_path, "--provider-dir", str(tmp_path / "c"))
        assert not (tmp_path / "c").exists()

    def test_a_task_with_a_coordinators_folder(self, tmp_path: Path) -> None:
        (tmp_path / "bad.py").write_text("from workers import task\n@task\ndef response() -> None: ...\n")
        line = refused(
            tmp_path, "--provider-dir", str(tmp_path / "c"), "--provider-name", "a", modules=("./bad.py",)
        )
        assert "the task response cannot be served" in line

    def test_a_folder_that_others_can_write_to(self, tmp_path: Path) -> None:
        folder = tmp_path / "c"
        folder.mkdir()
        folder.chmod(0o777)
        line = refused(tmp_path, "--provider-dir", str(folder), "--provider-name", "a")
        assert "others can write to the folder" in line
        assert not (tmp_path / "r.sock").exists()

    def test_a_live_provider_that_knows_no_locks(self, tmp_path: Path) -> None:
        folder = tmp_path / "c"
        (folder / "text").mkdir(parents=True)
        with GoPeer(folder / "text/50-a.sock"):
            line = refused(tmp_path, "--provider-dir", str(folder), "--provider-name", "a")
            assert "text/50-a.sock is in use" in line
            # Nothing of those that could be made is left.
            assert sockets(folder) == ["text/50-a.sock"]
