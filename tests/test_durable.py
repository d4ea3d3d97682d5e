"""A supervisor with a journal: what it has acknowledged is answered, whatever dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from peers import WAIT, ack, connected, frame, read_frame
from serving import Fifo, Hook, Served, environment, request, serve_command

from acomm import connect
from acomm.errors import BadRequest
from acomm.messages import Request
from acomm.origin import Origin
from workers import Supervisor
from workers.journalfile import DELIVERED, ENDED, JournalFile
from workers.stored import IN_FLIGHT, PAGE

pytestmark = pytest.mark.process

Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a supervisor with a journal; call it again for its successor."""
    tmp_path.chmod(0o700)
    running: list[Served] = []

    def start(*arguments: str) -> Served:
        running.append(
            Served(tmp_path, "--journal", str(tmp_path / "j.db"), *arguments, modules=("durabletasks",))
        )
        return running[-1]

    yield start
    for served in running:
        served.close()


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    with Hook(tmp_path / "hook.sock") as hook:
        yield hook


def accepted(served: Served, *args: Any, **more: Any) -> None:
    assert json.loads(served.ask(request(*args, **more)))["error"] == ""


def die(served: Served) -> None:
    served.signal(signal.SIGKILL)
    served.wait()


def rows(tmp_path: Path, what: str, which: str = "") -> list[Any]:
    with sqlite3.connect(tmp_path / "j.db") as db:
        found = db.execute(f"SELECT {what} FROM requests {which} ORDER BY seq").fetchall()
    db.close()
    return found


def test_what_ran_and_what_waited_is_answered_by_the_successor(
    serve: Serve, hook: Hook, fifos: tuple[Fifo, Fifo], tmp_path: Path
) -> None:
    served = serve("--workers", "1")
    started, release = fifos
    accepted(served, "runs", "hold", hook.url, [started.path, release.path])
    started.read()
    for n in range(50):
        accepted(served, f"w{n}", "add", hook.url, [n, 1])
    die(served)
    release.close()
    os.unlink(release.path)
    Path(release.path).write_text("")  # the second run need not wait
    serve("--workers", "1")
    started.read()
    answers = {answer["id"]: answer for answer in (hook.answer() for _ in range(51))}
    assert [answers[f"w{n}"]["result"] for n in range(50)] == [n + 1 for n in range(50)]
    assert answers["runs"]["error"] == ""


def test_an_answer_that_its_hook_has_not_taken_is_posted_again(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    silent = Hook(tmp_path / "hook.sock", reply=lambda body: None)
    runs = str(tmp_path / "runs")
    with silent:
        accepted(served, "a", "noted", silent.url, [runs, 7])
        silent.next()
        die(served)
    with Hook(tmp_path / "hook.sock") as hook:
        serve()
        assert hook.answer()["result"] == 7
    assert Path(runs).read_text() == "a 7\n", "it has not run again"


def test_what_another_service_has_answered_is_stored_before_it_is_told(
    serve: Serve, hook: Hook, tmp_path: Path
) -> None:
    """Asked again by the next supervisor, it might say something else."""
    served = serve()
    with Hook(tmp_path / "service.sock") as service:
        accepted(served, "f", "x", hook.url, [1], taskURL=service.url, streamURL=None)
        passed_on = json.loads(service.next()[4:])
        with connected(passed_on["responseHook"]["Path"]) as sock:
            answer = {"error": "", "id": "f", "result": 42, "streamURL": None}
            sock.sendall(frame(json.dumps(answer).encode()))
            assert json.loads(read_frame(sock))["error"] == ""
        assert hook.answer()["result"] == 42
        ((response,),) = rows(tmp_path, "response IS NOT NULL OR state = 2")
        assert response
        die(served)
        served = serve()
        served.until(lambda stats: not stats["journal"]["unfinished"] and not stats["hooks"]["pending"])
        assert service.received.empty()
        assert served.stats()["counts"].get("forwarded", 0) == 0


def test_an_ack_with_an_error_is_no_delivery(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    with Hook(tmp_path / "hook.sock", reply=lambda body: ack(error="not now")) as refusing:
        accepted(served, "a", "add", refusing.url, [1])
        refusing.next()
        die(served)
    with Hook(tmp_path / "hook.sock") as hook:
        serve()
        assert hook.answer()["result"] == 1


class TestRepeats:
    def test_are_known_after_a_restart(self, serve: Serve, hook: Hook, tmp_path: Path) -> None:
        served = serve()
        runs = str(tmp_path / "runs")
        accepted(served, "a", "noted", hook.url, [runs, 1])
        hook.answer()
        served.until(lambda stats: not stats["journal"]["unfinished"])
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
        served = serve()
        accepted(served, "a", "noted", hook.url, [runs, 1])
        other = json.loads(served.ask(request("a", "noted", hook.url, [runs, 2])))
        assert "was used for another request" in other["error"]
        accepted(served, "b", "noted", hook.url, [runs, 3])
        assert hook.answer()["id"] == "b"
        assert Path(runs).read_text() == "a 1\nb 3\n"

    def test_of_what_is_under_way(self, serve: Serve, hook: Hook, fifos: tuple[Fifo, Fifo]) -> None:
        served = serve()
        started, release = fifos
        accepted(served, "a", "hold", hook.url, [started.path, release.path])
        started.read()
        accepted(served, "a", "hold", hook.url, [started.path, release.path])
        release.close()
        hook.answer()
        assert served.stats()["counts"]["repeated"] == 1


def test_a_stop_leaves_what_it_cannot_finish(serve: Serve, hook: Hook, fifos: tuple[Fifo, Fifo]) -> None:
    served = serve("--workers", "1", "--drain-timeout", "0")
    started, _ = fifos
    accepted(served, "stays", "stay", hook.url, [started.path])
    started.read()
    accepted(served, "waits", "add", hook.url, [1])
    served.signal(signal.SIGTERM)
    assert served.wait() == 0
    serve("--workers", "2")
    answer = hook.answer()
    assert (answer["id"], answer["error"]) == ("waits", "")
    started.read()


def test_what_waits_in_the_file_can_be_cancelled_as_what_is_queued(
    serve: Serve, hook: Hook, fifos: tuple[Fifo, Fifo], tmp_path: Path
) -> None:
    served = serve("--workers", "1")
    started, release = fifos
    accepted(served, "runs", "hold", hook.url, [started.path, release.path])
    started.read()
    accepted(served, "near", "noted", hook.url, [str(tmp_path / "runs"), 0])
    many = IN_FLIGHT + PAGE
    messages = [request(f"w{n}", "echo", hook.url, [n], acomm=1) for n in range(many)]
    messages.append(request("far", "noted", hook.url, [str(tmp_path / "runs"), 1], acomm=1))
    with connected(served.path) as sock:
        for start in range(0, len(messages), 100):
            some = messages[start : start + 100]
            sock.sendall(b"".join(map(frame, some)))
            for _ in some:
                read_frame(sock)
    die(served)
    served = serve("--workers", "1")
    started.read()
    served.until(lambda stats: stats["queued"])
    # "far" is behind more than can be under way, and nothing ends.
    assert set(served.verb("acomm.known", ["near", "far", "nothing"])) == {"near", "far"}
    for id in ("far", "near"):
        assert served.verb("acomm.cancel", [id])
        answer = hook.answer()
        assert (answer["id"], answer["error"]) == (id, "call of task noted was cancelled")
        assert not served.verb("acomm.cancel", [id])
    assert not served.verb("acomm.cancel", ["nothing"])
    release.close()
    answers = sorted(hook.answer()["id"] for _ in range(many + 1))
    assert answers == sorted(["runs", *(f"w{n}" for n in range(many))])
    served.until(lambda stats: not stats["journal"]["unfinished"])
    assert not (tmp_path / "runs").exists()
    served.signal(signal.SIGTERM)
    assert served.wait() == 0
    assert {row[0] for row in rows(tmp_path, "state")} == {DELIVERED}


def test_time_passes_while_nobody_is_there(
    serve: Serve, hook: Hook, fifos: tuple[Fifo, Fifo], tmp_path: Path
) -> None:
    served = serve("--workers", "1")
    started, _ = fifos
    accepted(served, "stays", "stay", hook.url, [started.path])
    started.read()
    accepted(served, "late", "add", hook.url, [1], timeout=0.01)
    die(served)
    serve("--workers", "2")
    answers = [hook.answer()]
    assert answers[0]["id"] == "late"
    assert "timed out" in answers[0]["error"]
    ((code, response),) = rows(tmp_path, "code, response", "WHERE id = 'late'")
    assert code == "timeout"
    assert b"timed out" in response, "the next one says the same, whatever its clock"


def test_a_request_that_kills_supervisors_is_poisoned(serve: Serve, hook: Hook, tmp_path: Path) -> None:
    pid_file, runs = tmp_path / "pid", tmp_path / "runs"
    served = serve("--workers", "1")
    pid_file.write_text(str(served.pid))
    accepted(served, "deadly", "kill_supervisor", hook.url, [str(pid_file), str(runs)])
    for n in range(20):
        accepted_or_dead(served, f"n{n}", hook.url)
    served.wait()
    known = {row[0] for row in rows(tmp_path, "id")}
    for _ in range(3):
        pid_file.unlink()
        os.mkfifo(pid_file)  # so that it dies when it is ready, and known to us
        served = serve("--workers", "1")
        pid_file_write(pid_file, served.pid)
        served.wait()
    pid_file.unlink()
    serve("--workers", "1")
    answers = {answer["id"]: answer for answer in (hook.answer() for _ in known)}
    assert "supervisors have died" in answers.pop("deadly")["error"]
    assert len(runs.read_text().splitlines()) == 4
    assert all(answer["error"] == "" for answer in answers.values())


def accepted_or_dead(served: Served, id: str, hook: str) -> None:
    with contextlib.suppress(OSError, EOFError):
        served.ask(request(id, "echo", hook, [1]))


def pid_file_write(fifo: Path, pid: int) -> None:
    with open(fifo, "w") as file:
        file.write(str(pid))


def test_handlers_are_kept_with_their_request(serve: Serve, fifos: tuple[Fifo, Fifo], tmp_path: Path) -> None:
    served = serve("--workers", "1")
    started, _ = fifos
    told = Fifo(tmp_path / "told")
    path = told.path

    def on_success(request: Any, response: Any) -> None:
        with open(path, "w") as fifo:
            fifo.write(f"{request.id} {bytes(response.result).decode()}")

    with connect(served.url) as client:
        client.submit("stay", started.path)
        started.read()
        call = client.using(on_success=on_success).submit("add", 20, 22)
        served.until(lambda stats: stats["journal"]["unfinished"] == 2)
        die(served)
        serve("--workers", "2")
        assert told.read() == f"{call.id} 42"
    told.close()


def test_handlers_of_another_python_are_not_loaded_by_a_successor(
    serve: Serve, fifos: tuple[Fifo, Fifo], tmp_path: Path
) -> None:
    """Their code would crash the interpreter, and each further supervisor."""
    served = serve("--workers", "1")
    started, _ = fifos
    path = tmp_path / "loaded"

    def noted(request: Any, response: Any) -> None:
        path.write_text("loaded")

    with connect(served.url) as client:
        client.submit("stay", started.path)
        started.read()
        call = client.using(on_success=noted, on_error=noted).submit("add", 20, 22)
        served.until(lambda stats: stats["journal"]["unfinished"] == 2)
        die(served)
        with sqlite3.connect(tmp_path / "j.db") as db:
            (message,) = db.execute("SELECT message FROM requests WHERE id = ?", (call.id,)).fetchone()
            version = b'"python":"%d.%d"' % sys.version_info[:2]
            other = message.replace(version, b'"python":"3.9"')
            assert other != message
            db.execute("UPDATE requests SET message = ? WHERE id = ?", (other, call.id))
        db.close()
        served = serve("--workers", "2")
        with pytest.raises(BadRequest, match=r"pickled by Python 3\.9"):
            call.result(20)
        assert not path.exists()


def test_refusals_and_verbs_leave_no_row(serve: Serve, hook: Hook, tmp_path: Path) -> None:
    served = serve()
    assert json.loads(served.ask(request("u", "unknown", hook.url)))["error"]
    served.stats()
    served.signal(signal.SIGTERM)
    served.wait()
    assert rows(tmp_path, "id") == []


def test_what_nobody_knows_in_a_large_message_is_not_stored(serve: Serve, hook: Hook, tmp_path: Path) -> None:
    """It is not counted as arguments are, and would fill the disk."""
    served = serve()
    accepted(served, "a", "fail", hook.url, ["x"], unknown="x" * 100_000)
    hook.answer()
    served.signal(signal.SIGTERM)
    served.wait()
    ((size,),) = rows(tmp_path, "length(message)")
    assert size < 1000


async def test_a_fault_of_ours_leaves_the_accounts_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would close the door in time, or never."""
    tmp_path.chmod(0o700)

    def broken(*args: Any, **more: Any) -> None:
        raise OSError(24, "Too many open files")

    hook, origin = f"unix://{tmp_path}/hook.sock", Origin.unix(os.getuid())
    told: list[Any] = []
    settings: dict[str, Any] = {"socket": tmp_path / "s.sock", "journal": tmp_path / "j.db", "workers": 1}
    async with Supervisor("durabletasks", **settings) as supervisor:
        monkeypatch.setattr(supervisor.tracker, "new_stream_unix", broken)
        passed_on = Request("add", msgspec.Raw(b"[1]"), response_hook=hook, task_url=f"unix://{tmp_path}/t")
        passed_on = msgspec.structs.replace(passed_on, stream_url=f"unix://{tmp_path}/stream")
        examined = supervisor._examine(passed_on, origin, None)
        assert examined is not None
        supervisor.admission.take(examined.account, examined.size)
        assert supervisor.begin(examined) is not None
        assert supervisor.tracker.num_requests == 0, "nor is it answered by its timeout"
        assert supervisor.keeper is not None
        monkeypatch.setattr(supervisor.keeper.stored, "store", broken)
        request = Request("add", msgspec.Raw(b"[1]"), response_hook=hook)
        supervisor.offer(request, origin, lambda *decided: told.append(decided))
        assert "the supervisor failed" in str(told[0][0])
        assert supervisor.admission.total.requests == 0


async def test_answers_that_memory_has_no_room_for_come_from_the_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path, origin = tmp_path / "hook.sock", Origin.unix(os.getuid())
    settings: dict[str, Any] = {"socket": tmp_path / "s.sock", "journal": tmp_path / "j.db", "workers": 1}
    async with Supervisor("durabletasks", **settings) as supervisor:
        delivery = supervisor.tracker.delivery
        delivery._outbox.max_bytes = 100_000
        refused: list[Any] = []
        for number in range(20):
            args = msgspec.Raw(b'["%d %b"]' % (number, b"x" * 20_000))
            supervisor.offer(
                Request("echo", args, response_hook=f"unix://{path}"),
                origin,
                lambda error, *_: refused.append(error),
            )
        async with asyncio.timeout(WAIT):
            while supervisor.stats()["counts"].get("ok", 0) < 20:
                await asyncio.sleep(0.01)
            while delivery.pending_bytes >= 200_000:  # those of one commit are all under way at first
                await asyncio.sleep(0.01)
            assert delivery.pending == 20
            with Hook(path) as hook:
                answers = [await asyncio.to_thread(hook.answer) for _ in range(20)]
                await delivery.drained()
        assert refused == [None] * 20
        assert {int(answer["result"].split()[0]) for answer in answers} == set(range(20))
        assert delivery.abandoned == 0


def test_acknowledgements_keep_their_order(serve: Serve, hook: Hook) -> None:
    """Those of what is stored come later than refusals, but not behind them."""
    served = serve()
    messages = [request(f"r{n}", "add" if n % 2 else "unknown", hook.url, [1], acomm=1) for n in range(20)]
    with connected(served.path) as sock:
        sock.sendall(b"".join(frame(message) for message in messages))
        acks = [json.loads(read_frame(sock)) for _ in messages]
    assert [ack["id"] for ack in acks] == [f"r{n}" for n in range(20)]
    assert [bool(ack["error"]) for ack in acks] == [n % 2 == 0 for n in range(20)]


class TestFullDisk:
    def test_requests_are_refused_until_there_is_space(
        self, serve: Serve, hook: Hook, tmp_path: Path
    ) -> None:
        """The limit of a file's size stands for that of the disk: a write fails all the same."""
        import resource

        served = serve()
        accepted(served, "a", "echo", hook.url, ["x"])
        hook.answer()
        _, hard = resource.prlimit(served.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (200_000, hard))
        refused = None
        for n in range(100):
            reply = json.loads(served.ask(request(f"b{n}", "echo", hook.url, ["x" * 20_000], acomm=1)))
            if reply["error"]:
                refused = reply
                break
        assert refused is not None
        assert refused["error_info"]["code"] == "busy"
        assert "cannot be written" in refused["error"]
        resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (hard, hard))
        accepted(served, refused["id"], "echo", hook.url, ["now"])
        answers = {hook.answer()["id"] for _ in range(n + 1)}
        assert answers == {f"b{i}" for i in range(n + 1)}


class TestFailed:
    def run(self, served: Served, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from workers.cli import cli; cli()", *arguments],
            env=environment(served.folder, ACOMM_URL=served.url),
            cwd=served.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    def test_are_listed_replayed_and_purged(self, serve: Serve, hook: Hook, tmp_path: Path) -> None:
        served = serve()
        lucky = tmp_path / "lucky"
        accepted(served, "a", "unlucky", hook.url, [str(lucky)])
        accepted(served, "b", "fail", hook.url, ["for good"])
        assert {hook.answer()["id"], hook.answer()["id"]} == {"a", "b"}
        listed = json.loads(self.run(served, "failed", "--json"))
        assert [(row["id"], row["code"], row["error"]) for row in listed] == [
            ("b", "task_error", "ValueError: for good"),
            ("a", "task_error", "ValueError: not yet"),
        ]
        whole = self.run(served, "failed", "a")
        assert f'args: ["{lucky}"]' in whole
        assert "Traceback" in whole
        assert "not yet" in self.run(served, "replay", "a", "durabletasks", "--inline", status=1)
        lucky.write_text("")
        assert self.run(served, "replay", "a", "durabletasks", "--inline") == '"done"\n'
        self.run(served, "replay", "a")
        answer = hook.answer()
        assert (answer["id"], answer["result"]) == ("a", "done")
        assert "takes 1000 ids" in self.run(served, "purge", *(f"x{n}" for n in range(1001)), status=1)
        assert "1 request forgotten" in self.run(served, "purge", "--all")
        assert self.run(served, "failed") == ""
        assert "no failed request" in self.run(served, "replay", "b", status=1)

    def test_one_that_is_replayed_twice_at_once_runs_once(
        self, serve: Serve, hook: Hook, tmp_path: Path
    ) -> None:
        served = serve()
        runs = tmp_path / "runs"
        accepted(served, "a", "noted_failure", hook.url, [str(runs)])
        hook.answer()
        served.until(lambda stats: not stats["journal"]["unfinished"])
        with Hook(tmp_path / "verbs") as verbs:
            frames = [frame(request(f"v{n}", "acomm.replay", verbs.url, ["a"], acomm=1)) for n in range(5)]
            with connected(served.path) as sock:
                sock.sendall(b"".join(frames))
                answers = [verbs.answer() for _ in frames]
        assert sum(answer["result"] is True for answer in answers) == 1
        hook.answer()
        served.until(lambda stats: not stats["journal"]["unfinished"])
        assert runs.read_text() == "a\na\n"

    def test_one_whose_answer_a_recovery_has_yet_to_deliver_is_not_replayed(
        self, serve: Serve, tmp_path: Path
    ) -> None:
        served = serve()
        nobody = f"unix://{tmp_path}/nobody.sock"
        accepted(served, "a", "fail", nobody, ["for good"])
        served.until(lambda stats: stats["hooks"]["pending"])
        die(served)
        file = JournalFile(str(tmp_path / "j.db"))
        row = file.find("a")
        assert row is not None
        assert row.state == ENDED
        assert file.replay(row.seq) == 0
        file.close()

    def test_dead_letters_are_among_them(self, serve: Serve, tmp_path: Path) -> None:
        served = serve()
        nobody = f"unix://{tmp_path}/nobody.sock"
        accepted(served, "a", "add", nobody, [1])
        served.until(lambda stats: stats["hooks"]["pending"])
        assert self.run(served, "failed") == ""

    def test_without_a_journal_there_is_nothing_to_list(self, tmp_path: Path) -> None:
        with Served(tmp_path) as served:
            assert "--journal" in self.run(served, "failed", status=1)


@pytest.mark.parametrize("via", ["unix", "http"])
def test_what_is_passed_on_again_is_no_other_request(
    serve: Serve, hook: Hook, fifos: tuple[Fifo, Fifo], short_folder: Path, via: str
) -> None:
    """The other service has it once, and its answer finds the successor."""
    started, release = fifos
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    ours = ("--http", address, "--http-no-token") if via == "http" else ()
    theirs = ("--http", "127.0.0.1:0", "--http-no-token", "--allow-hook", address)
    with Served(short_folder, *theirs, modules=("durabletasks",)) as other:
        url = other.url if via == "unix" else other.stats()["http"]["url"]
        served = serve(*ours)
        accepted(served, "f", "hold", hook.url, [started.path, release.path], taskURL=url)
        started.read()
        die(served)
        serve(*ours)
        other.until(lambda stats: stats["counts"].get("repeated") == 1)
        release.close()
        answer = hook.answer()
        assert (answer["id"], answer["error"]) == ("f", "")
        assert other.stats()["counts"]["accepted"] == 1


def test_a_copy_of_a_journal_that_is_in_use_is_refused(
    serve: Serve, tmp_path: Path, short_folder: Path
) -> None:
    """All that is unfinished would be done twice, and other services could not tell the two apart."""
    serve()
    copy = short_folder / "copy.db"
    with sqlite3.connect(tmp_path / "j.db") as db, sqlite3.connect(copy) as copied:
        db.backup(copied)
    db.close()
    copied.close()
    copy.chmod(0o600)
    command = serve_command(short_folder / "s.sock", "--journal", str(copy))
    done = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 2
    assert "one of the two journals is a copy of the other" in done.stderr
