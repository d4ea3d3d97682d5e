"""launch(): a supervisor for as long as a block lasts, and not a moment longer."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from peers import WAIT
from serving import Family, Fifo, environment

from workers import Config, launch
from workers.errors import ConfigError, ConnectionLost

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def own_tmp(tmp_path: Path, folder_for_all: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, to see what is left in it. pytest has made its own before."""
    monkeypatch.setenv("TMPDIR", str(folder_for_all))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder_for_all))
    return folder_for_all


def test_calls_and_an_end_that_leaves_nothing(own_tmp: Path) -> None:
    with launch("servedtasks", workers=2) as client:
        assert client.call("add", 1, 2) == 3
        pid = client.stats()["pid"]
        assert len(client.stats()["workers"]) == 2
        family = Family(pid)
    assert family.survivors(0) == []
    family.close()
    assert not psutil.pid_exists(pid)
    assert [path.name for path in own_tmp.iterdir()] == ["acomm"]
    assert list((own_tmp / "acomm").iterdir()) == []


def test_every_setting_arrives_and_nothing_of_the_environments(
    own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORKERS", "MAX_FRAME"):
        monkeypatch.setenv(f"ACOMM_{name}", "4096")
    monkeypatch.setenv("ACOMM_HTTP", "nonsense")
    with launch("servedtasks", workers=1, http="127.0.0.1:0", http_no_token=True, max_frame=8192) as client:
        stats = client.stats()
        assert len(stats["workers"]) == 1
        assert stats["http"]["url"].startswith("http://127.0.0.1:")
        command = psutil.Process(stats["pid"]).cmdline()
    settings = Config.from_json(command[command.index("--settings") + 1])
    assert (settings.max_frame, settings.modules) == (8192, ("servedtasks",))
    with pytest.raises(ConfigError, match="settings: "):
        Config.from_json('{"workers": 0}')


def test_an_error_in_the_block_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError):
        with launch("servedtasks", workers=1, drain_timeout=0.1) as client:
            pid = client.stats()["pid"]
            client.submit("stay", os.devnull)
            1 / 0  # noqa: B018
    assert not psutil.pid_exists(pid)


def test_what_was_submitted_is_finished(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "fifo")
    path = fifo.path
    with launch("servedtasks", workers=1) as client:
        client.using(on_success=lambda request, response: Path(path).write_text("ran")).submit("spin", 1)
    assert fifo.read() == "ran"
    fifo.close()


def test_settings_are_passed_on(tmp_path: Path) -> None:
    with launch(
        "servedtasks", workers=1, socket=tmp_path / "here.sock", max_frame=10_000, drain_timeout=0.1
    ) as client:
        assert client.url == f"unix://{tmp_path}/here.sock"
        call = client.submit("stay", os.devnull)
        assert client.stats()["socket"] == str(tmp_path / "here.sock")
    with pytest.raises(ConnectionLost):
        call.result(WAIT)


def test_temporary_files_may_be_far_away(own_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = own_tmp / ("x" * 100)
    far.mkdir()
    monkeypatch.setenv("TMPDIR", str(far))
    with launch("servedtasks", workers=1) as client:
        assert client.call("add", 1) == 1
    assert list(far.iterdir()) == []


@pytest.mark.parametrize(
    ("modules", "settings"),
    [((), {}), (("nowhere_at_all",), {}), (("servedtasks",), {"socket": "/proc/no.sock"})],
)
def test_a_supervisor_that_does_not_start(
    modules: tuple[str, ...], settings: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError):
        with launch(*modules, workers=1, **settings):
            raise AssertionError("it has started")
    assert "Traceback" not in capfd.readouterr().err


def test_bad_settings_are_refused_here() -> None:
    with pytest.raises(ConfigError, match="workers"):
        with launch("servedtasks", workers=0):
            raise AssertionError("it has started")


def test_the_child_ends_when_the_parent_is_killed(own_tmp: Path) -> None:
    script = (
        "import sys, time\n"
        "from workers import launch\n"
        "with launch('servedtasks', workers=2) as client:\n"
        "    client.submit('stay', '/dev/null')\n"
        "    client.submit('crunch')\n"
        "    while not all(worker['task'] for worker in client.stats()['workers']): pass\n"
        "    print(client.stats()['pid'], flush=True)\n"
        "    time.sleep(1000)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script.replace("workers=2", "workers=2, drain_timeout=0.2")],
        env=environment(own_tmp, TMPDIR=str(own_tmp)),
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    family = Family(parent.pid)
    assert pid in family.fds
    assert len(family.fds) >= 4
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert family.survivors(WAIT) == []
    family.close()
