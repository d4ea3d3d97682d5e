"""Where the kernel counts its OOM kills: read as it writes them, on systems of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers import oomkills
from workers.oomkills import OomKills

EVENTS = "low 0\nhigh 0\nmax 7\noom 3\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


@pytest.mark.parametrize(
    ("cgroups", "file", "text"),
    [
        ("0::/app.slice/app.service\n", "app.slice/app.service/memory.events", EVENTS),
        ("0::/of/the/host\n", "memory.events", EVENTS),  # in a container
        ("0::/\n", "memory.events", EVENTS),
        ("9:name=systemd:/\n4:cpu,memory:/app:x\n0::/\n", "memory/app:x/memory.oom_control", CONTROL),
        ("4:memory:/of/the/host\n0::/\n", "memory/memory.oom_control", CONTROL),
    ],
)
def test_the_counter_of_the_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroups: str, file: str, text: str
) -> None:
    monkeypatch.setattr(oomkills, "VMSTAT", str(tmp_path / "none"))
    (tmp_path / "cgroup").write_text(cgroups)
    counter = tmp_path / "fs" / file
    counter.parent.mkdir(parents=True)
    counter.write_text(text.format(2))
    kills = OomKills(str(tmp_path / "fs"), str(tmp_path / "cgroup"))
    assert repr(kills) == f"<OomKills 2 by {counter}>"
    assert not kills.look()
    counter.write_text(text.format(3))
    assert kills.look() and not kills.look()


def test_the_counter_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 4\n")
    monkeypatch.setattr(oomkills, "VMSTAT", str(tmp_path / "vmstat"))
    kills = OomKills(str(tmp_path / "none"), str(tmp_path / "none"))
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 5\n")
    assert kills.look()


def test_nothing_is_known_where_nothing_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmstat").write_text("oom_kill many\nnonsense\n\n")
    monkeypatch.setattr(oomkills, "VMSTAT", str(tmp_path / "vmstat"))
    kills = OomKills(str(tmp_path / "none"), str(tmp_path / "vmstat"))
    assert repr(kills) == "<OomKills 0 by nothing>" and not kills.look()


def test_a_counter_that_goes_away_is_no_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmstat").write_text("oom_kill 4\n")
    monkeypatch.setattr(oomkills, "VMSTAT", str(tmp_path / "vmstat"))
    kills = OomKills(str(tmp_path / "none"), str(tmp_path / "none"))
    (tmp_path / "vmstat").unlink()
    assert not kills.look()
