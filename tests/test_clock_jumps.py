"""A clock that somebody sets by a year: nothing times out early, and nothing is forgotten and runs twice."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from peers import WAIT, connected, frame, read_frame
from serving import Fifo, Hook, request

from workers import Supervisor, journalfile
from workers.journalfile import ENDED, WINDOW, Batch, Ending, Entry, JournalFile

YEAR = 365 * 24 * 3600.0
JUMPS = pytest.mark.parametrize("by", [YEAR, -YEAR], ids=["forward", "back"])

Set = Callable[[float], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Set]:
    """Set the time of day by so many seconds, for this process."""
    right = time.time

    def change(by: float) -> None:
        monkeypatch.setattr(time, "time", lambda: right() + by)

    yield change


@JUMPS
def test_a_stored_id_is_known_for_as_long_as_it_is_to_be(
    tmp_path: Path, set_clock: Set, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    monkeypatch.setattr(journalfile, "COMPACT_EVERY", 0.0)
    tmp_path.chmod(0o700)
    file = JournalFile(str(tmp_path / "j.db"))

    def stored(seq: int) -> None:
        batch = Batch()
        batch.entries = [Entry(seq, f"r{seq}", b"d", "t", b"{}", 3, True, "unix:0", time.time())]
        batch.ended = [Ending(seq, b"answer", None)]
        batch.delivered = [seq]
        file.write(batch)

    stored(1)
    set_clock(by)
    assert file.compact() == 0
    stored(2)
    set_clock(0)
    assert file.compact() == 0
    for id in "r1", "r2":
        row = file.find(id)
        assert row is not None
        assert row.state > ENDED
    file.close()
    # The time between two supervisors is what the clock says.
    later = JournalFile(str(tmp_path / "j.db"), wall=lambda: time.time() + WINDOW + 1)
    assert later.compact() == 2
    later.close()


@JUMPS
@pytest.mark.process
async def test_what_runs_has_its_time_and_repeats_are_known(
    tmp_path: Path, set_clock: Set, started: Fifo, release: Fifo, by: float
) -> None:
    tmp_path.chmod(0o700)
    runs = tmp_path / "runs"

    def ask(message: bytes) -> str:
        with connected(str(tmp_path / "s.sock")) as sock:
            sock.sendall(frame(message))
            error: str = json.loads(read_frame(sock))["error"]
            return error

    def use() -> None:
        with Hook(tmp_path / "hook") as hook:
            noted = request("noted", "noted", hook.url, [str(runs), 1])
            args = [started.path, release.path]
            assert ask(noted) == ask(request("held", "hold", hook.url, args, acomm=1, timeout=2 * WAIT)) == ""
            started.read()
            assert hook.answer()["id"] == "noted"
            set_clock(by)
            assert ask(noted) == ""
            assert hook.answer()["id"] == "noted"
            assert ask(request("new", "add", hook.url, [1], acomm=1, timeout=2 * WAIT)) == ""
            assert hook.answer()["result"] == 1
            release.close()
            answer = hook.answer()
            assert (answer["id"], answer["error"]) == ("held", "")

    settings = {"socket": str(tmp_path / "s.sock"), "journal": str(tmp_path / "j.db"), "workers": 2}
    async with Supervisor("durabletasks", **settings) as supervisor:
        await asyncio.to_thread(use)
        assert set(supervisor.stats()["counts"]) <= {"accepted", "ok", "repeated"}
    assert len(runs.read_text().splitlines()) == 1
