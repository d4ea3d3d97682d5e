"""The journal's file: what is written is there afterwards, and whose file it is."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers import journalfile, journalplace
from workers.errors import ConfigError
from workers.journalfile import (
    ACCEPTED,
    DELIVERED,
    ENDED,
    KEEP_FAILED,
    UNDELIVERED,
    WINDOW,
    Batch,
    Ending,
    Entry,
    JournalFile,
)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> str:
    tmp_path.chmod(0o700)
    return str(tmp_path / "journal")


def opened(path: str, wall: Callable[[], float]) -> JournalFile:
    return JournalFile(path, wall=wall)


def entry(seq: int, id: str | None = None, *, digest: bytes = b"d", task: str = "t") -> Entry:
    return Entry(seq, id or f"r{seq}", digest, task, b'{"n":%d}' % seq, 3, True, "unix:0", 1.0)


def batch(**parts: Any) -> Batch:
    made = Batch()
    for name, value in parts.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("count", [1, 3, 4, 5, 15, 21, 64, 255, 256, 300, 1000])
def test_batches_of_all_sizes_are_stored_whole(path: str, wall: Clock, count: int) -> None:
    file = opened(path, wall)
    seqs = list(range(1, count + 1))
    assert file.write(batch(entries=[entry(seq) for seq in seqs])) == {}
    ends = [Ending(seq, b"answer %d" % seq, "timeout" if seq % 2 else None) for seq in seqs]
    file.write(batch(ended=ends))
    rows = file.unfinished(0, 2000, 2000)
    assert [row.seq for row in rows] == seqs
    assert all(row.response == b"answer %d" % row.seq and row.state == ENDED for row in rows)
    assert all(row.code == ("timeout" if row.seq % 2 else None) for row in rows)
    file.write(batch(delivered=seqs))
    assert file.unfinished(0, 2000, 2000) == []
    for seq in seqs:
        row = file.find(f"r{seq}")
        assert row is not None
        assert row.state == DELIVERED
        kept = seq % 2 == 1  # it has failed
        assert (row.message is not None, row.response is not None) == (kept, kept)
    file.close()


def test_a_known_id_is_not_stored_and_its_row_is_told(path: str, wall: Clock) -> None:
    file = opened(path, wall)
    file.write(batch(entries=[entry(1), entry(2)]))
    known = file.write(batch(entries=[entry(3), entry(4, "r1", digest=b"x"), entry(5, "r3"), entry(6)]))
    assert {seq: (row.id, row.seq) for seq, row in known.items()} == {4: ("r1", 1), 5: ("r3", 3)}
    assert known[4].digest == b"d"
    assert [row.seq for row in file.unfinished(0, 10, 10)] == [1, 2, 3, 6]
    file.close()


def test_nothing_of_a_batch_is_written_that_fails(path: str, wall: Clock) -> None:
    file = opened(path, wall)
    with pytest.raises(sqlite3.Error):
        file.write(batch(entries=[entry(1)], ended=[Ending(1, object(), None)]))  # type: ignore[arg-type]
    assert file.find("r1") is None
    file.write(batch(entries=[entry(1)]))
    assert file.find("r1") is not None
    file.close()


def test_what_was_committed_outlives_the_process(path: str, wall: Clock) -> None:
    file = opened(path, wall)
    file.write(batch(entries=[entry(1), entry(2)], ended=[Ending(1, b"a", None)]))
    pid = os.fork()
    if not pid:
        os._exit(0)  # no close, no checkpoint, though its descriptors go
    os.waitpid(pid, 0)
    file.abandon()
    again = opened(path, wall)
    assert (again.epoch, again.last) == (file.epoch + 1, 2)
    assert [row.state for row in again.unfinished(0, 10, 10)] == [ENDED, ACCEPTED]
    again.close()


def test_pages_follow_each_other(path: str, wall: Clock) -> None:
    file = opened(path, wall)
    file.write(batch(entries=[entry(seq) for seq in range(1, 11)], delivered=[4]))
    assert [row.seq for row in file.unfinished(0, 4, 9)] == [1, 2, 3, 5]
    assert [row.seq for row in file.unfinished(5, 10, 9)] == [6, 7, 8, 9]
    assert file.count_unfinished() == 9
    file.close()


def test_a_page_of_large_rows_is_short(path: str, wall: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journalfile, "_READ_AT_ONCE", 1000)
    file = opened(path, wall)
    large = [entry(seq)._replace(message=bytes(400)) for seq in range(1, 6)]
    file.write(batch(entries=large, ended=[Ending(5, bytes(2000), None)]))
    pages = [[row.seq for row in file.unfinished(after, 10, 9)] for after in (0, 3, 5)]
    assert pages == [[1, 2, 3], [4, 5], []]
    file.close()


def test_boots_are_counted_and_taken_back(path: str, wall: Clock) -> None:
    file = opened(path, wall)
    file.write(batch(entries=[entry(1), entry(2)]))
    file.taken_up([1, 2])
    file.taken_up([1])
    assert [row.boots for row in file.unfinished(0, 10, 10)] == [2, 1]
    file.put_back([1])
    assert [row.boots for row in file.unfinished(0, 10, 10)] == [1, 1]
    file.close()


class TestFailed:
    def test_they_are_listed_the_last_first(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        file.write(batch(entries=[entry(1), entry(2), entry(3, task="other"), entry(4)]))
        file.write(batch(ended=[Ending(1, b"e", "timeout"), Ending(2, b"r", None), Ending(3, b"e", "x")]))
        file.write(batch(delivered=[1, 3], undelivered=[2]))
        assert [(row.seq, row.code, row.state) for row in file.failed(10)] == [
            (3, "x", DELIVERED),
            (2, "undelivered", UNDELIVERED),
            (1, "timeout", DELIVERED),
        ]
        assert [row.seq for row in file.failed(10, "other")] == [3]
        assert [row.seq for row in file.failed(1)] == [3]
        file.close()

    def test_a_replayed_one_runs_or_is_delivered_again(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        file.write(batch(entries=[entry(1), entry(2), entry(3)]))
        file.write(batch(ended=[Ending(1, b"e", "timeout"), Ending(2, b"r", None)]))
        file.write(batch(delivered=[1], undelivered=[2, 3]))  # 3 was a stream
        for seq in (1, 2, 3):
            file.replay(seq)
        rows = file.unfinished(0, 10, 10)
        assert [(row.state, row.response) for row in rows] == [
            (ACCEPTED, None),
            (ENDED, b"r"),
            (ACCEPTED, None),
        ]
        assert file.failed(10) == []
        file.close()

    def test_a_purged_one_leaves_its_id(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        file.write(batch(entries=[entry(1), entry(2)]))
        file.write(batch(ended=[Ending(1, b"e", "timeout")], delivered=[1]))
        assert file.purge([1, 2]) == 1
        assert file.failed(10) == []
        assert file.write(batch(entries=[entry(3, "r1")])).keys() == {3}
        assert [row.seq for row in file.unfinished(0, 10, 10)] == [2]
        file.close()

    def test_all_are_purged_but_those_on_their_way(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        file.write(batch(entries=[entry(n, task="u" if n == 1 else "t") for n in range(1, 8)]))
        file.write(batch(ended=[Ending(n, b"e", "timeout") for n in range(1, 8)]))
        file.write(batch(delivered=[1, 2, 3, 4], undelivered=[5]))
        assert file.purge_some(2, "t") == 2
        assert [file.purge_some(2) for _ in range(3)] == [2, 1, 0]
        assert [row.seq for row in file.failed(9)] == [7, 6]
        file.close()


def test_old_rows_go_and_no_others(path: str, wall: Clock) -> None:
    file = opened(path, wall)
    file.write(batch(entries=[entry(seq) for seq in range(1, 6)]))
    file.write(batch(ended=[Ending(2, b"e", "timeout")], delivered=[1, 2, 3], undelivered=[5]))
    wall.now += WINDOW + 1
    assert file.compact() == 2
    assert file.find("r1") is None
    assert file.find("r2") is not None
    wall.now += KEEP_FAILED
    assert file.compact() == 2
    assert [row.seq for row in file.unfinished(0, 10, 10)] == [4]
    file.close()


def test_what_is_kept_does_not_keep_what_is_behind_it(
    path: str, wall: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journalfile, "COMPACTED_AT_ONCE", 10)
    file = opened(path, wall)
    file.write(batch(entries=[entry(seq) for seq in range(1, 101)]))
    file.write(batch(ended=[Ending(1, b"e", "timeout")]))
    file.write(batch(delivered=[1, *range(3, 96)]))
    wall.now += WINDOW + 1
    assert [file.compact() for _ in range(12)] == [8, *[10] * 8, 5, 0, None]
    young = [entry(seq)._replace(accepted=wall.now) for seq in range(101, 201)]
    file.write(batch(entries=young, delivered=[2]))
    wall.now += journalfile.COMPACT_EVERY
    assert [file.compact() for _ in range(2)] == [0, None], "what is young is not looked at"
    wall.now += WINDOW
    assert file.compact() == 1
    assert [row.seq for row in file.unfinished(0, 200, 200)] == [*range(96, 201)]
    file.close()


class TestLargeRows:
    """They are read a few at a time, and only where they are needed: a thousand are more than any memory."""

    def test_are_not_read_to_tell_that_an_id_is_known(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        file.write(batch(entries=[entry(1)]))
        known = file.write(batch(entries=[entry(2, "r1"), entry(3, "r1")]))
        assert [(row.id, row.digest, row.message) for row in known.values()] == [("r1", b"d", None)] * 2
        assert file.undone(["r1", "r2"]) == ["r1"]
        file.close()

    def test_are_not_read_to_list_them(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        file.write(batch(entries=[entry(1), entry(2)]))
        large = b"x" * 100_000
        file.write(batch(ended=[Ending(1, b"e", "timeout"), Ending(2, large, None)], undelivered=[2]))
        assert [(row.seq, row.message, row.response) for row in file.failed(9)] == [
            (2, None, None),
            (1, None, b"e"),
        ]
        found = file.find("r2")
        assert found is not None
        assert found.response == large
        file.close()

    def test_come_a_few_at_a_time(self, path: str, wall: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(journalfile, "_READ_AT_ONCE", 250_000)
        file = opened(path, wall)
        file.write(batch(entries=[entry(n)._replace(message=b"x" * 100_000) for n in range(1, 6)]))
        assert [row.seq for row in file.unfinished(0, 100, 100)] == [1, 2, 3]
        assert [row.seq for row in file.unfinished(3, 100, 100)] == [4, 5]
        file.write(batch(delivered=[4]))  # no question is left open
        file.close()


class TestWhoseFile:
    def refused(self, path: str) -> str:
        with pytest.raises(ConfigError) as caught:
            JournalFile(path)
        return str(caught.value)

    def test_it_is_for_its_owner_alone(self, path: str, wall: Clock) -> None:
        opened(path, wall).close()
        assert os.stat(path).st_mode & 0o777 == 0o600
        os.chmod(path, 0o640)
        assert "chmod it to 600" in self.refused(path)

    def test_another_supervisors_is_refused(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        assert "in use by another supervisor" in self.refused(path)
        file.close()
        opened(path, wall).close()

    def test_it_is_held_though_its_lock_file_is_tidied_away(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        os.unlink(f"{path}.lock")
        assert "in use by another supervisor" in self.refused(path)
        file.write(batch(entries=[entry(1)]))
        file.close()
        opened(path, wall).close()

    @pytest.mark.parametrize("part", ["", "-wal"])
    def test_whether_it_is_where_the_next_one_looks(self, path: str, wall: Clock, part: str) -> None:
        file = opened(path, wall)
        file.write(batch(entries=[entry(1)]))
        file.checkpoint()
        assert file.in_place()
        os.rename(path + part, f"{path}.away")
        assert not file.in_place()
        Path(path + part).write_bytes(b"")
        assert not file.in_place()
        os.rename(f"{path}.away", path + part)
        assert file.in_place()
        file.close()

    def test_no_database(self, path: str) -> None:
        Path(path).write_bytes(b"something else, and long enough to be looked at as a header" * 20)
        os.chmod(path, 0o600)
        before = Path(path).read_bytes()
        assert "is no journal: name another file" in self.refused(path)
        assert Path(path).read_bytes() == before

    def test_another_programs_database(self, path: str) -> None:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE t (x)")
        db.close()
        os.chmod(path, 0o600)
        assert "another program's database" in self.refused(path)

    def test_a_newer_one(self, path: str, wall: Clock) -> None:
        opened(path, wall).close()
        with sqlite3.connect(path) as db:
            db.execute(f"PRAGMA user_version = {journalfile.SCHEMA + 1}")
        db.close()
        text = self.refused(path)
        assert "newer acomm" in text
        assert "move the file away" in text

    def test_a_damaged_one(self, path: str, wall: Clock) -> None:
        file = opened(path, wall)
        file.write(batch(entries=[entry(seq) for seq in range(1, 2000)]))
        file.close()
        with open(path, "r+b") as raw:
            raw.seek(journalfile.PAGE)
            raw.write(b"\xff" * 50_000)
        assert "damaged" in self.refused(path)

    def test_a_link_or_folder(self, path: str, tmp_path: Path) -> None:
        os.symlink(tmp_path / "elsewhere", path)
        assert "cannot use the journal" in self.refused(path)
        assert self.refused(str(tmp_path))

    def test_a_file_system_of_another_host(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Mount:
            mountpoint, fstype = os.path.dirname(path), "nfs4"

        monkeypatch.setattr(journalplace.psutil, "disk_partitions", lambda all: [Mount])
        assert "nfs4" in self.refused(path)
