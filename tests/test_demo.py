"""The demo, made small: the same run over forty files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers import demo
from workers.sourcecode import analyse, standard_library

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def few_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    files = sorted(standard_library(tests=False), key=os.path.getsize)[-300:-260]
    monkeypatch.setattr(demo, "standard_library", lambda tests: files)


def test_a_worker_is_killed_and_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(workers=2, quick=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 source files of Python 3.")
    assert "lost after the kill: 0 of 40 files, 0 failed calls" in lines
    assert "totals: the same as in one process" in lines
    assert any(line.startswith("killed: worker ") and line.endswith("replaced: 1") for line in lines)
    assert sum("complexity" in line for line in lines) == 1


def test_a_run_that_proves_nothing_or_differs_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = demo.standard_library(tests=False)[:6]
    monkeypatch.setattr(demo, "standard_library", lambda tests: files)
    monkeypatch.setattr(demo, "_kill_a_busy_worker", lambda client: 0)
    # The comparison, in this process, counts one file in the place of all.
    monkeypatch.setattr(demo, "analyse", lambda file: analyse(files[0]))
    assert demo.run(workers=1) == 1
    out = capsys.readouterr().out
    assert "lost after the kill: 0 of 6 files, 0 failed calls" in out
    assert "totals: DIFFERENT from one process" in out


def test_on_a_terminal_it_shows_a_bar_with_a_rate() -> None:
    main, terminal = os.openpty()
    code = "from workers.demo import _tracked; list(_tracked('counting', 50, iter(range(50))))"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=terminal,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as program:
        os.close(terminal)
        shown = b""
        try:
            while data := os.read(main, 65536):
                shown += data
        except OSError:  # the other end is closed
            pass
        os.close(main)
    text = shown.decode()
    assert program.returncode == 0, text
    assert "counting" in text
    assert "50/50" in text
    assert "files/s" in text
