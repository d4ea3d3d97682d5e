"""The demo, made small: the same run over forty files."""

from __future__ import annotations

import os
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
