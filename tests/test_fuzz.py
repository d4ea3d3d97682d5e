"""The targets of `scripts/fuzz` stand some thousand mutated inputs, the same ones each time."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from workers.calls import Answer
from workers.scoreboard import Scoreboard

FUZZ = Path(__file__).parent.parent / "scripts" / "fuzz"


@pytest.mark.process
@pytest.mark.parametrize("target", ["framing", "requests", "responses", "answers", "slots", "http"])
def test_nothing_comes_out_of_what_is_mutated(target: str, tmp_path: Path) -> None:
    frames = "500" if target == "http" else "3000"
    command = [
        sys.executable,
        str(FUZZ),
        "--target",
        target,
        "--frames",
        frames,
        "--keep",
        str(tmp_path / "kept"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 exceptions" in done.stdout
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("seconds", [math.inf, -math.inf, -1.0, 1e300])
def test_a_worker_that_tells_of_impossible_times_has_lost_its_mind(seconds: float) -> None:
    message = msgspec.msgpack.encode([Answer(1, seconds, b"1")])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(message, type=list[Answer])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_progress_is_told_that_is_no_number(value: float) -> None:
    board = Scoreboard.create(1)
    try:
        writer = board.writer(0)
        writer.begin(1, value)
        writer.progress(value, value)
        slot = board.read(0)
        assert (slot.call, slot.started, slot.done, slot.total) == (1, 0.0, 0.0, 0.0)
    finally:
        board.close()
