"""scripts/chaos: its checker finds every breach and no other, and a supervisor commits none."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

from chaoslib.checker import check, figures, story  # noqa: E402
from chaoslib.history import History, Log, Tail, outcome  # noqa: E402
from chaoslib.schedule import A_MINUTE, ABOUT, plan  # noqa: E402
from chaoslib.work import right  # noqa: E402

RIGHT = right("quick", 7)
ANSWERED = ["10 sent a quick 7 kept", "20 acked a", "30 begin a 1 100", "40 end a 1 100"]
TAKEN = f"50 posted a {RIGHT} 1"
LOST = "50 posted a error:worker_lost:killed 1"


def history(*lines: str) -> History:
    found = History()
    found.feed(lines)
    return found


def kinds(*lines: str, durable: bool = True) -> list[str]:
    return [violation.kind for violation in check(history(*lines), durable=durable)]


class TestChecker:
    @pytest.mark.parametrize(
        "lines",
        [
            [TAKEN],
            [TAKEN, TAKEN.replace("50", "60")],  # posted again, as its acknowledgement was lost
            [f"45 posted a {RIGHT} 0", TAKEN],  # refused once
            ["35 kill worker 100", LOST],
            ["35 kill template 99 100 101", LOST],
            ["35 kill supervisor 5", "36 down 5 -9", "40 begin a 1 200", TAKEN],
            ["35 kill worker 100", "40 begin a 1 200", TAKEN],
            [
                "25 kill worker 100",
                "32 killed 100",
                "45 begin a 1 200",
                TAKEN,
            ],  # begun before the signal came
            ["15 refused a busy", "16 again a", TAKEN],
        ],
        ids=str,
    )
    def test_what_is_as_promised_passes(self, lines: list[str]) -> None:
        assert kinds(*ANSWERED, *lines) == []
        assert kinds(*reversed([*ANSWERED, *lines])) == []  # files are read in any order

    @pytest.mark.parametrize(
        ("kind", "lines"),
        [
            ("lost", []),
            ("lost", ["35 kill supervisor 5", "36 down 5 -9"]),
            ("undelivered", [f"50 posted a {RIGHT} 0"]),
            ("wrong", ["50 posted a ok:8 1"]),
            ("wrong", ["50 posted a ok: 1".replace("ok:", "ok:None")]),
            ("wrong", [LOST]),  # nobody has killed anything
            ("wrong", ["60 kill worker 100", LOST]),  # not before
            ("wrong", ["50 posted a error:timeout:late 1"]),
            ("wrong", ["5 kill worker 100", LOST]),
            ("two outcomes", ["35 kill worker 100", LOST, f"60 posted a {RIGHT} 1"]),
            ("again", ["45 begin a 1 200", TAKEN]),
            ("again", ["25 kill worker 100", "45 begin a 1 200", TAKEN]),
            ("again", ["35 kill worker 300", "45 begin a 1 200", TAKEN]),
            ("again", ["25 kill worker 100", "28 killed 100", "45 begin a 1 200", TAKEN]),
            ("refused", ["15 refused a conflict", TAKEN]),
            ("survivor", [TAKEN, "60 survived 77 5000"]),
            ("stranger", [TAKEN, "60 posted b ok:1 1"]),
            ("stranger", [TAKEN, "60 begin b 1 100"]),
            ("unreadable", [TAKEN, "60 posted a"]),
        ],
        ids=str,
    )
    def test_what_is_not_is_found(self, kind: str, lines: list[str]) -> None:
        assert kinds(*ANSWERED, *lines) == [kind]

    def test_a_cut_request_is_neither_executed_nor_answered(self) -> None:
        assert kinds("1 cut a") == []
        assert "stranger" in kinds("1 cut a", "2 begin a 1 100")

    def test_who_is_never_acknowledged_hangs_unless_it_has_given_up(self) -> None:
        assert kinds("1 sent a quick 7 plain", "2 again a") == ["hanging"]
        assert kinds("1 sent a quick 7 flood") == []
        assert kinds("1 sent a quick 7 raw") == []

    def test_a_clients_call_ends_and_says_why(self) -> None:
        sent = "10 sent a quick 7 user"
        assert kinds(sent) == ["hanging"]
        assert kinds(sent, f"50 returned a {RIGHT}") == []
        lost = "50 returned a error:connection_lost:gone"
        assert kinds(sent, lost) == ["wrong"]
        assert kinds(sent, "20 down 5 -9", lost) == []
        assert kinds("3 kill supervisor 5", sent, "20 up 6", lost) == []  # it was away already
        assert kinds("3 kill supervisor 5", "4 up 6", sent, lost) == ["wrong"]

    def test_without_a_journal_a_dead_supervisor_takes_along_what_it_had(self) -> None:
        death = ["35 kill supervisor 5", "36 down 5 -9"]
        assert kinds(*ANSWERED, *death, durable=False) == []
        assert kinds(*ANSWERED, durable=False) == ["lost"]
        assert kinds(*ANSWERED, "5 down 4 -9", durable=False) == ["lost"]  # an earlier one

    def test_a_task_that_kills_its_worker_explains_what_it_has_hit(self) -> None:
        killer = [
            "10 sent k die 1 kept",
            "11 acked k",
            "32 begin k 1 100",
            "50 posted k error:worker_lost:x 1",
        ]
        assert kinds(*ANSWERED, *killer, "45 begin a 1 200", TAKEN) == []

    def test_a_peer_that_is_told_no_codes_may_be_told_of_poison(self) -> None:
        told = quote("3 supervisors have died while this request was under way", safe="")
        poisoned = f"50 posted a error:-:{told} 1"
        assert kinds(*ANSWERED, "32 down 4 -9", "35 down 5 -9", poisoned) == []
        assert kinds(*ANSWERED, "35 down 5 -9", poisoned) == ["wrong"]

    def test_the_story_of_an_id_is_told_in_order(self) -> None:
        told = story(history(TAKEN, *ANSWERED).calls["a"])
        assert [line.split()[2] for line in told] == ["sent", "acknowledged", "execution", "posted"]

    def test_its_figures(self) -> None:
        lines = ["35 kill worker 100", "38 begin a 1 200", TAKEN, TAKEN.replace("50", "60")]
        found = figures(history(*ANSWERED, *lines))
        names = ("acknowledged", "answered", "posted again", "executions", "extra executions")
        assert [found[name] for name in names] == [1, 1, 1, 2, 1]
        assert found["in flight at kills"] == 1


class TestHistory:
    def test_lines_come_whole_however_a_file_grows(self, tmp_path: Path) -> None:
        log = Log(tmp_path / "log")
        tail = Tail(tmp_path / "log")
        log.note("acked", "a")
        with open(tmp_path / "log", "a") as file:
            file.write("1 acked")
        assert [line.split()[1:] for line in tail.read()] == [["acked", "a"]]
        with open(tmp_path / "log", "a") as file:
            file.write(" b\n")
        assert tail.read() == ["1 acked b"]
        tail.close()
        log.close()

    def test_an_outcome_is_one_word(self) -> None:
        assert outcome({"error": "", "result": 5}) == "ok:5"
        told = outcome({"error": "it was\nkilled", "error_info": {"code": "worker_lost"}})
        assert told == "error:worker_lost:it%20was%0Akilled"


class TestSchedule:
    def test_a_seed_makes_one_schedule_and_leaving_a_fault_out_moves_no_other(self) -> None:
        faults = tuple(ABOUT)
        whole = plan(1, 600, faults)
        assert whole == plan(1, 600, faults) != plan(2, 600, faults)
        assert plan(1, 600, faults[1:]) == [one for one in whole if one.fault != faults[0]]
        assert whole == sorted(whole)

    def test_seven_kills_in_ten_are_of_workers(self) -> None:
        workers, supervisors = A_MINUTE["worker"] + A_MINUTE["template"], A_MINUTE["supervisor"]
        assert workers / (workers + supervisors) == pytest.approx(0.7)


def chaos(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "chaos"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, env={**os.environ, **environment}
    )


def _first_up(log: Path, run: subprocess.Popen[str]) -> int:
    """The pid of a run's first supervisor, when it is ready."""
    timer = threading.Event()
    for _ in range(int(60 / 0.02)):
        if log.exists() and (found := re.search(r" up (\d+)\n", log.read_text())):
            return int(found[1])
        if run.poll() is not None:
            break
        timer.wait(0.02)
    run.kill()
    raise AssertionError(f"no supervisor: {run.communicate()[0]}")


@pytest.mark.process
class TestRuns:
    def test_nothing_that_was_promised_is_broken(self) -> None:
        faults = ",".join(fault for fault in ABOUT if fault != "calls" or shutil.which("cc"))
        words = ["--minutes", "0.17", "--rate", "300", "--fault-rate", "1.5", "--settle", "60"]
        done = chaos(*words, "--faults", faults)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_without_a_journal_nothing_but_a_dead_supervisors_calls_is_lost(self) -> None:
        words = ["--no-journal", "--minutes", "0.08", "--rate", "200"]
        done = chaos(*words, "--faults", "worker,template,supervisor,cut")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_nothing_stays_behind_when_it_is_killed(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        command = [sys.executable, str(ROOT / "scripts" / "chaos"), "--faults", "disk", "--keep", str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            assert run.stdout is not None
            try:
                pid = _first_up(folder / "runner.log", run)
                supervisor = os.pidfd_open(pid)
            finally:
                run.kill()
            run.wait()
            assert select.select([supervisor], [], [], 20)[0], "the supervisor goes on"
            os.close(supervisor)
        assert str(folder) not in Path("/proc/mounts").read_text()

    @pytest.mark.parametrize(
        ("planted", "kind", "faults"),
        [("drop", "lost", "worker"), ("twice", "two outcomes", "worker"), ("forget", "lost", "supervisor")],
    )
    def test_a_planted_defect_is_found(
        self, rounds: range, tmp_path: Path, planted: str, kind: str, faults: str
    ) -> None:
        if len(rounds) == 1 and planted != "forget":
            pytest.skip("takes a quarter of a minute: with --rounds 2 or more")
        words = ["--minutes", "0.13", "--rate", "300", "--settle", "3", "--faults", faults, "--seed", "5"]
        words += ["--fault-rate", "4"]
        words += ["--keep", str(tmp_path / "run"), "--supervisor", str(ROOT / "tests" / "planted.py")]
        done = chaos(*words, PLANTED=planted)
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"\n{kind}: " in done.stdout
        assert re.search(r"^  [a-z]+-\d-\d+: ", done.stdout, re.MULTILINE)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--faults", "worker,fire"], "no fault fire; there are worker, "),
            (["--minutes", "0"], "--minutes and --rate must be more than 0"),
            (["--no-journal", "--faults", "disk"], "a full disk is the journal's"),
        ],
        ids=str,
    )
    def test_what_cannot_be_tried_is_said(self, words: list[str], said: str) -> None:
        done = chaos(*words)
        assert done.returncode == 2
        assert said in done.stderr.splitlines()[-1]
