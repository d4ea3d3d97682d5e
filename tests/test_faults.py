"""Faults from outside: what is killed, when, and what it may cost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, Peer, connected, frame, read_all, read_frame
from serving import Family, Fifo, Hook, Served, environment, kill, pidfd, request

import acomm
from acomm.client import Client
from acomm.errors import ConnectionLost, ShuttingDown, WorkerLost

pytestmark = pytest.mark.process


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with acomm.connect(served.url, default_timeout=WAIT) as client:
        yield client


def crunching(served: Served, client: Client) -> list[int]:
    """Have every worker run C code for minutes; their pids."""
    for _ in range(2):
        client.submit("crunch")
    stats = served.until(lambda stats: all(worker["task"] == "crunch" for worker in stats["workers"]))
    return [worker["pid"] for worker in stats["workers"]]


class TestKilledWorker:
    def test_in_the_middle_of_a_thousand_calls(self, served: Served, client: Client) -> None:
        calls = [client.submit("spin", number) for number in range(1000)]
        reached = threading.Event()
        calls[300].add_done_callback(lambda call: reached.set())
        assert reached.wait(WAIT)
        stats = client.stats()
        victim = next((worker for worker in stats["workers"] if worker["task"]), stats["workers"][0])
        kill(victim["pid"])
        done, hanging = wait(calls, WAIT)
        assert not hanging
        lost = [call for call in done if call.exception()]
        assert all(isinstance(call.exception(), WorkerLost) for call in lost)
        assert len(lost) <= 1
        for number, call in enumerate(calls):
            assert call in lost or call.result() == number
        stats = served.until(lambda stats: [worker["state"] for worker in stats["workers"]] == ["ready"] * 2)
        assert stats["worker_restarts"] == 1
        assert victim["pid"] not in [worker["pid"] for worker in stats["workers"]]
        assert stats["tracked"] == 0

    def test_the_running_call_is_told_how(self, client: Client, started: Fifo) -> None:
        call = client.submit("stay", started.path)
        pid = int(started.read())
        kill(pid)
        with pytest.raises(WorkerLost, match="killed by SIGKILL while it ran task stay") as caught:
            call.result(WAIT)
        assert caught.value.receipt is not None
        assert (caught.value.receipt["pid"], caught.value.receipt["signal"]) == (pid, signal.SIGKILL)

    def test_a_task_may_ask_to_be_tried_again(self, client: Client) -> None:
        assert client.call("survive", "x") == 2

    def test_all_of_them_at_once(self, served: Served, client: Client) -> None:
        calls = [client.submit("spin", number) for number in range(200)]
        for worker in client.stats()["workers"]:
            kill(worker["pid"])
        done, hanging = wait(calls, WAIT)
        assert not hanging
        assert sum(call.exception() is not None for call in done) <= 2
        assert client.call("add", 1, 1) == 2

    def test_the_process_that_forks_them(self, served: Served, client: Client) -> None:
        calls = [client.submit("spin", number) for number in range(200)]
        family = Family(served.pid)
        workers = {worker["pid"] for worker in client.stats()["workers"]}
        for pid in set(family.fds) - workers:
            kill(pid)
        done, hanging = wait(calls, WAIT)
        assert not hanging
        assert sum(call.exception() is not None for call in done) <= 2
        assert client.call("add", 1, 1) == 2
        family.close()


class TestKilledSupervisor:
    def test_takes_its_workers_along_even_out_of_c_code(self, served: Served, client: Client) -> None:
        workers = crunching(served, client)
        family = Family(served.pid)
        assert set(workers) < set(family.fds)
        kill(served.pid)
        assert family.survivors(1.0) == []
        family.close()
        served.wait()

    def test_its_socket_is_taken_over_and_clients_go_on(self, served: Served, client: Client) -> None:
        assert client.call("add", 1) == 1
        kill(served.pid)
        served.wait()
        assert os.path.exists(served.path)
        with pytest.raises(ConnectionLost):
            client.call("add", 1)
        with Served(served.folder):
            assert client.call("add", 2) == 2

    def test_calls_that_it_had_taken_fail_and_do_not_wait(
        self, served: Served, client: Client, started: Fifo
    ) -> None:
        calls = [client.submit("stay", started.path)]
        started.read()
        calls += [client.submit("crunch") for _ in range(100)]
        client.stats()
        kill(served.pid)
        for call in calls:
            with pytest.raises(ConnectionLost, match="went away before it answered"):
                call.result(WAIT)
        assert client._answers == {}

    def test_nothing_is_left_of_its_private_folder(
        self, tmp_path: Path, folder_for_all: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(folder_for_all))
        with Served(tmp_path) as served:
            assert list(folder_for_all.iterdir())
            family = Family(served.pid)
            kill(served.pid)
            assert family.survivors(WAIT) == []
            family.close()
            assert list(folder_for_all.iterdir()) == []


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_what_runs_is_finished_and_nothing_new_is_taken(
        self, served: Served, tmp_path: Path, started: Fifo, release: Fifo, number: int
    ) -> None:
        with Hook(tmp_path / "hook") as hook, connected(served.path) as before:
            message = request("running", "hold", hook.url, [started.path, release.path], acomm=1)
            before.sendall(frame(message))
            assert json.loads(read_frame(before))["error"] == ""
            pid = int(started.read())
            served.ask(request("queued-1", "add", hook.url, [1]))
            assert hook.answer()["result"] == 1  # by the other worker
            served.signal(number)
            assert served.notified() == "STOPPING=1"
            for sock in (before, None):
                with connected(served.path) as fresh:
                    to = sock or fresh
                    to.sendall(frame(request("new", "add", hook.url, [1], acomm=1)))
                    info = json.loads(read_frame(to))["error_info"]
                    assert info["code"] == "shutting_down"
            # What was taken before is acknowledged again, and questions are answered.
            before.sendall(frame(message))
            assert json.loads(read_frame(before))["error"] == ""
            assert served.stats()["state"] == "draining"
            release.close()
            assert hook.answer()["result"] == pid
            assert read_all(before) == b""
        assert served.wait() == 0
        assert not os.path.exists(served.path)
        assert not os.path.exists(served.path + ".lock")
        assert "Traceback" not in served.stderr()

    def test_a_generation_1_request_is_refused_at_its_hook(
        self, served: Served, tmp_path: Path, started: Fifo, release: Fifo
    ) -> None:
        with Hook(tmp_path / "hook", raw=True) as hook:
            served.ask(request("held", "hold", None, [started.path, release.path]))
            started.read()
            served.signal(signal.SIGTERM)
            assert served.notified() == "STOPPING=1"
            with connected(served.path) as sock:
                message = {"id": "late", "task": "add", "responsehook": hook.url, "args": [1]}
                sock.sendall(json.dumps(message).encode())
            assert json.loads(hook.next())["error"] == "the supervisor is stopping"
            release.close()
        assert served.wait() == 0

    def test_idle_it_ends_at_once_and_leaves_nothing(self, served: Served) -> None:
        family = Family(served.pid)
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
        assert family.survivors(0.5) == []
        family.close()
        assert {path.name.partition("-")[0] for path in served.folder.iterdir()} <= {
            "notify",
            "stderr",
            "acomm",
        }
        assert list((served.folder / "acomm").iterdir()) == []

    def test_a_second_signal_ends_it_at_once(self, served: Served, tmp_path: Path, started: Fifo) -> None:
        with Hook(tmp_path / "hook") as hook:
            served.ask(request("stays", "stay", hook.url, [started.path]))
            started.read()
            family = Family(served.pid)
            served.signal(signal.SIGTERM)
            assert served.notified() == "STOPPING=1"
            served.signal(signal.SIGTERM)
            assert served.process.wait(5) == 0  # the drain timeout is 10
            assert hook.answer()["error"] == "the supervisor stopped before the task ended"
            assert family.survivors(1) == []
            family.close()

    def test_what_runs_longer_is_answered_shutting_down(self, tmp_path: Path, started: Fifo) -> None:
        with (
            Served(tmp_path, "--drain-timeout", "0.2") as served,
            acomm.connect(served.url, default_timeout=WAIT) as client,
        ):
            calls = [client.submit("stay", started.path)]
            started.read()
            calls += [client.submit("crunch") for _ in range(3)]  # one that runs, two that wait
            served.until(lambda stats: stats["assigned"] == 2)
            family = Family(served.pid)
            served.signal(signal.SIGTERM)
            for call in calls:
                with pytest.raises(ShuttingDown):
                    call.result(WAIT)
            assert served.wait() == 0
            assert family.survivors(1) == []
            family.close()

    def test_while_it_starts(self, tmp_path: Path, started: Fifo) -> None:
        (tmp_path / "slow.py").write_text(
            f"import os, time\nfrom workers import task\n@task\ndef f(): pass\n"
            f"if os.path.basename(os.readlink('/proc/self/exe')) and os.getppid() != {os.getpid()}:\n"
            f"    open({started.path!r}, 'w').write(str(os.getpid()))\n    time.sleep(10_000)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "slow", "--socket", str(tmp_path / "s")],
            cwd=tmp_path,
            env=environment(tmp_path),
            stderr=subprocess.PIPE,
        )
        try:
            with pidfd(int(started.read())) as loading:
                process.send_signal(signal.SIGTERM)
                _, stderr = process.communicate(timeout=WAIT)
                assert process.returncode == 0
                assert b"Traceback" not in stderr
                with pytest.raises(ProcessLookupError):
                    for _ in range(100):
                        signal.pidfd_send_signal(loading, 0)
                        threading.Event().wait(0.05)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()

    def test_undelivered_answers_do_not_hold_it_up(self, served: Served, tmp_path: Path) -> None:
        def never(conn: socket.socket) -> None:
            conn.recv(1)
            closing.wait(WAIT)

        closing = threading.Event()
        with Peer(tmp_path / "hole", never) as hole:
            for number in range(10):
                served.ask(request(f"hole-{number}", "add", hole.url, [1]))
                served.ask(request(f"gone-{number}", "add", f"unix://{tmp_path}/gone", [1]))
            served.until(lambda stats: stats["hooks"]["pending"] >= 20)
            served.signal(signal.SIGTERM)
            assert served.process.wait(6) == 0  # not the drain timeout, let alone the hooks' time
            closing.set()


class TestHooks:
    def test_one_that_never_acknowledges_delays_nobody(self, served: Served, tmp_path: Path) -> None:
        closing = threading.Event()
        with Peer(tmp_path / "hole", lambda conn: closing.wait(WAIT) and None) as hole:
            with Hook(tmp_path / "hook") as hook:
                for number in range(200):
                    served.ask(request(f"hole-{number}", "add", hole.url, [1]))
                for number in range(50):
                    served.ask(request(f"good-{number}", "add", hook.url, [number]))
                assert {hook.answer()["result"] for _ in range(50)} == set(range(50))
            assert served.stats()["hooks"]["pending"] >= 200
            closing.set()

    def test_a_client_that_is_killed_leaves_nothing_behind(
        self, served: Served, tmp_path: Path, started: Fifo, release: Fifo
    ) -> None:
        script = (
            "import acomm, sys\n"
            "client = acomm.connect(sys.argv[1])\n"
            "held = [client.submit('hold', *sys.argv[2:]) for _ in range(2)]\n"
            "while [worker['task'] for worker in client.stats()['workers']] != ['hold'] * 2: pass\n"
            "rest = [client.submit('spin', number) for number in range(200)]\n"
            "client.stats()\n"
            "print('submitted', flush=True)\n"
            "held[0].result()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, served.url, started.path, release.path],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"submitted\n"
        process.kill()
        process.wait()
        process.stdout.close()
        assert served.stats()["tracked"] == 202
        release.close()
        served.until(lambda stats: (stats["tracked"], stats["queued"], stats["assigned"]) == (0, 0, 0))
        # Its answers are tried again for a while; they hold no descriptor meanwhile.
        assert served.stats()["connections"] == 1


class TestNothingLeaks:
    def test_over_ten_thousand_requests(self, served: Served, client: Client) -> None:
        def round(count: int) -> None:
            calls = [client.submit("add", number, 1) for number in range(count)]
            assert [call.result(WAIT) for call in calls] == [number + 1 for number in range(count)]

        def figures() -> dict[str, Any]:
            stats = served.until(lambda stats: stats["tracked"] == 0 and stats["hooks"]["pending"] <= 1)
            folder = Path("/proc", str(served.pid))
            return {
                "descriptors": len(list((folder / "fd").iterdir())),
                "threads": len(list((folder / "task").iterdir())),
                "tracked": stats["tracked"],
                "queued": stats["queued"],
                "assigned": stats["assigned"],
                "children": len(stats["workers"]),
            }

        round(500)
        before = figures()
        for _ in range(10):
            round(1000)
        for number in range(100):  # one connection and one hook each
            served.verb("acomm.tasks")
            served.ask(request(f"plain-{number}", "add", None, [1]))
        after = figures()
        # A connection of ours may be closing still when the figures are taken.
        assert after.pop("descriptors") <= before.pop("descriptors") + 2
        assert after == before
        assert (after["tracked"], after["queued"], after["assigned"]) == (0, 0, 0)

    def test_over_two_hundred_clients(self, served: Served) -> None:
        folder = Path("/proc", str(served.pid), "fd")
        with acomm.connect(served.url, default_timeout=WAIT) as client:
            client.call("add", 1)
        served.until(lambda stats: stats["connections"] == 1)
        before = len(list(folder.iterdir()))
        for number in range(200):
            with acomm.connect(served.url, default_timeout=WAIT) as client:
                assert client.call("add", number) == number
        served.until(lambda stats: stats["connections"] == 1)
        assert len(list(folder.iterdir())) <= before + 2


class TestServiceManager:
    def test_an_abstract_address_and_one_that_nobody_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from workers.service import notify

        name = f"acomm-test-{os.getpid()}-{time.monotonic_ns()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(f"\0{name}")
            sock.settimeout(WAIT)
            monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
            notify("READY=1")
            assert sock.recv(100) == b"READY=1"
        notify("READY=1")
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nowhere"))
        notify("READY=1")
        monkeypatch.delenv("NOTIFY_SOCKET")
        notify("READY=1")
