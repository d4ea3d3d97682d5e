"""A disk that does not keep what it was given: the supervisor ends, and the next one goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import connected, frame, read_frame
from serving import Fifo, Hook, Served, request

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

from chaoslib.shim import NoCompiler, Shim  # noqa: E402

pytestmark = pytest.mark.process


@pytest.fixture
def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shim]:
    """Has system calls fail in what is started from now on."""
    try:
        made = Shim(tmp_path)
    except NoCompiler as error:
        pytest.skip(str(error))
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made._page.close()


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    with Hook(tmp_path / "hook") as hook:
        yield hook


def acknowledged(path: str, message: bytes) -> bool:
    """Whether a request is acknowledged. A refusal, and the end of the one that was asked, are not."""
    try:
        with connected(path) as sock:
            sock.sendall(frame(message))
            return not json.loads(read_frame(sock))["error"]
    except (OSError, EOFError):
        return False


@pytest.mark.parametrize(("error", "after"), [("EIO", 0), ("EIO", 1), ("EIO", 4), ("ENOSPC", 0)])
def test_what_was_acknowledged_is_answered_by_the_next_one(
    tmp_path: Path, shim: Shim, hook: Hook, started: Fifo, release: Fifo, error: str, after: int
) -> None:
    """And what was not may be sent again."""
    tmp_path.chmod(0o700)
    given = ("--journal", str(tmp_path / "j.db"))
    kept = []
    with Served(tmp_path, *given, modules=("durabletasks",)) as served:
        for number in range(3):
            args = [started.path, release.path]
            assert acknowledged(served.path, request(f"held-{number}", "hold", hook.url, args))
            kept.append(f"held-{number}")
        started.read()
        for call in "fsync", "fdatasync":
            shim.arm(call, error, pid=served.pid, after=after)
        for number in range(20):
            if acknowledged(served.path, request(f"r{number}", "add", hook.url, [number], acomm=1)):
                kept.append(f"r{number}")
        assert served.wait() != 0
        assert "cannot be trusted any more" in served.stderr()
        assert len(kept) < 23
    shim.disarm_all()
    with Served(tmp_path, *given, modules=("durabletasks",)) as served:
        release.close()
        if "r19" not in kept:
            assert acknowledged(served.path, request("r19", "add", hook.url, [19], acomm=1))
            kept.append("r19")
        answers: dict[str, Any] = {}
        while not answers.keys() >= set(kept):
            answer = hook.answer()
            assert answer["error"] == ""
            assert answers.setdefault(answer["id"], answer["result"]) == answer["result"]
        assert all(answers[id] == int(id[1:]) for id in kept if id.startswith("r"))
