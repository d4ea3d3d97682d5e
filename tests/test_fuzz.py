"""The targets of `scripts/fuzz` stand some thousand mutated inputs, the same ones each time."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.calls import Answer
from workers.scoreboard import Scoreboard

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

from fuzzing.command import MOST_GROWTH, fuzz, run  # noqa: E402
from fuzzing.connections import Connected  # noqa: E402
from fuzzing.guided import MISSING  # noqa: E402
from fuzzing.targets import TARGETS, kept  # noqa: E402
from fuzzing.workertargets import Answers  # noqa: E402

FUZZ = ROOT / "scripts" / "fuzz"
FRAMES = {"http": "1000", "unix": "1000", "hooks": "1000"}


@pytest.mark.process
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_comes_out_of_what_is_mutated(target: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(FUZZ),
        *("--target", target),
        *("--frames", FRAMES.get(target, "3000")),
        *("--keep", str(tmp_path / "kept")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 exceptions" in done.stdout
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("name", [name for name in TARGETS if kept(name)])
def test_what_failed_once_does_not_again(name: str) -> None:
    target = TARGETS[name]()
    try:
        for path in kept(name):
            for seed in range(20):
                target.feed(path.read_bytes(), random.Random(seed))
    finally:
        if isinstance(target, Connected):
            target.close()


class Faulty:
    """Fails at one sample of two, and keeps as much as it is told of every input."""

    def __init__(self, keeps: int = 0) -> None:
        self.kept: list[bytes] = []
        self.keeps = keeps

    def samples(self) -> list[bytes]:
        return [b"good", b"bad!"]

    def feed(self, data: bytes, dice: random.Random) -> None:
        self.kept.append(b"x" * self.keeps)
        if data == b"bad!":
            raise RecursionError("too deep")


def test_what_fails_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not fuzz("faulty", Faulty(), 500, 100.0, 1, tmp_path / "kept")
    told = capsys.readouterr().out
    assert "RecursionError: too deep" in told
    kept = list((tmp_path / "kept").iterdir())
    assert len(kept) == 10
    assert all(path.read_bytes() == b"bad!" and str(path) in told for path in kept)


def test_what_is_left_behind_is_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.command._WARM", 1000)
    monkeypatch.setattr(Faulty, "samples", lambda self: [b"good"])
    assert fuzz("tidy", Faulty(), 3000, 100.0, 1, tmp_path)
    assert not fuzz("leaking", Faulty(MOST_GROWTH // 100), 3000, 100.0, 1, tmp_path)


def test_one_that_is_interrupted_tells_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def feed(self: Faulty, data: bytes, dice: random.Random) -> None:
        self.kept.append(data)
        if len(self.kept) == 700:
            raise KeyboardInterrupt

    monkeypatch.setattr(Faulty, "feed", feed)
    monkeypatch.setitem(TARGETS, "framing", Faulty)
    assert run(["--target", "framing", "--frames", "5000", "--keep", str(tmp_path)]) == 130
    assert " 700 frames " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--frames", "1", "--minutes", "1"], ["--guided", "http", "--total", "9"]]
)
def test_limits_that_exclude_each_other_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        run(arguments)


def test_without_atheris_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["--guided", "framing"]) == 2
    assert capsys.readouterr().err == MISSING + "\n"


@pytest.mark.process
def test_a_target_is_guided_by_coverage(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    kept = tmp_path / "kept"
    command = [sys.executable, str(FUZZ), "--guided", "requests", "--frames", "3000", "--keep", str(kept)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Instrumenting acomm.messages" in done.stderr
    assert "number_of_executed_units: 3000" in done.stderr
    assert not kept.exists()


parts = (
    st.none() | st.booleans() | st.sampled_from([0, 1, 2, 3, -1, 2**63, 2**64 - 1, 0.0, -0.0, 1e9, math.inf])
)
parts |= st.sampled_from(
    [math.nan, b"", b"1", b"{", "", "task_error", "returned", "abandoned", "outgrown", "cancelled"]
)
parts |= st.text(max_size=4) | st.binary(max_size=4)
failures = st.lists(parts, max_size=6) | st.tuples(
    st.sampled_from(["task_error", "returned", "abandoned", "outgrown", "timeout", "no such"]),
    *(st.text(max_size=3), st.none() | st.text(max_size=3), st.none() | st.text(max_size=3), st.booleans()),
)
answers = st.lists(parts, max_size=6) | st.tuples(
    *(st.integers(0, 4), st.floats(0, 10), st.none() | st.binary(max_size=3)),
    *(st.none() | failures, st.none() | st.sampled_from(["unix:///s", "", "http://h"])),
)


@settings(max_examples=500)
@given(st.lists(answers, max_size=5) | parts | st.lists(parts, max_size=3))
def test_whatever_a_worker_says_each_call_ends_once(message: Any) -> None:
    Answers().feed(msgspec.msgpack.encode(message), random.Random(0))


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
