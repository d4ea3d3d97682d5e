"""The table of the Go original's names: each leads to a name of ours and to a test that shows it. What no
other test shows is shown here.
"""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peers import WAIT, GoPeer
from serving import PROJECT, Served

import acomm
from acomm import BadRequest, Request, Response, Tracker


class Row(NamedTuple):
    go: str
    generations: str
    ours: str
    test: str


def table(text: str) -> list[Row]:
    """The rows of all tables that begin with the header `| Go |`, without their code marks."""
    rows = []
    for block in re.findall(r"^\| Go \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        for line in block.splitlines():
            rows.append(Row(*(cell.strip().strip("`") for cell in line.strip("|").split("|"))))
    return rows


TABLE = table((PROJECT / "docs/go-names.md").read_text())


class TestTable:
    def test_no_cell_is_empty_and_no_name_comes_twice(self) -> None:
        assert len(TABLE) > 100
        assert [row for row in TABLE if not all(row)] == []
        assert [name for name, times in Counter(row.go for row in TABLE).items() if times > 1] == []

    def test_every_generation_is_one(self) -> None:
        known = {"1 2 3", "2 3", "3"}
        assert {row.generations for row in TABLE} == known

    @pytest.mark.parametrize("name", sorted({row.ours for row in TABLE}))
    def test_our_name_exists(self, name: str) -> None:
        assert name.partition(".")[0] in ("acomm", "workers")
        assert pkgutil.resolve_name(name) is not None

    def test_the_tests_exist(self) -> None:
        files = sorted({row.test.partition("::")[0] for row in TABLE})
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=-q", *files],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        collected = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
        assert len(collected) > 100, done.stdout + done.stderr
        assert {row.test for row in TABLE} - collected == set()


URL = "unix:///run/x.sock"
OPTIONS: dict[str, Any] = {
    "task": "t",
    "task_url": "http://example.com:80/a",
    "response_hook": "unix:///run/hook.sock",
    "stream_url": "http://example.com/stream?addr=x",
    "args": {"a": 1},
    "on_success": print,
    "on_error": repr,
}


def test_a_request_takes_every_option_of_the_originals() -> None:
    request = Request(**OPTIONS)
    assert {name: getattr(request, name) for name in OPTIONS} == OPTIONS
    sent = json.loads(request.encode(3))
    assert list(sent) == ["id", "task", "taskURL", "responseHook", "streamURL", "args"]
    read = Request.decode(request.encode(3))
    handlers = ("on_success", "on_error")  # they never travel by themselves
    assert [getattr(read, name) for name in handlers] == [None, None]
    assert read.args is not None
    assert json.loads(bytes(read.args)) == OPTIONS["args"]
    urls = ("task_url", "response_hook", "stream_url")
    assert [getattr(read, name) for name in urls] == [OPTIONS[name] for name in urls]


@pytest.mark.parametrize("name", ["response_hook", "stream_url", "task_url"])
def test_a_bad_url_is_refused_where_the_original_refuses_it(name: str) -> None:
    for url in ("", "no url", "unix://relative", "tcp://1.2.3.4:5", "http://"):
        with pytest.raises(BadRequest):
            Request("t", **{name: url}).validate()  # type: ignore[arg-type]
    Request("t", **{name: URL}).validate()  # type: ignore[arg-type]


async def test_a_response_goes_to_the_requests_hook(tmp_path: Path) -> None:
    with GoPeer(tmp_path / "hook.sock") as hook:
        request = Request("t", id="i", response_hook=hook.url, wire=2)
        await request.respond(Response.to(request, {"n": 1}))
        assert hook.messages == [{"error": "", "id": "i", "result": {"n": 1}, "stream_url": None}]


async def test_a_trackers_address_and_url_are_those_of_its_socket(tmp_path: Path) -> None:
    async with Tracker(tmp_path / "t.sock") as tracker:
        assert tracker.addr == f"{tmp_path}/t.sock"
        assert tracker.url == f"unix://{tmp_path}/t.sock"
        assert Path(tracker.addr).is_socket()


@pytest.mark.process
def test_a_task_may_ask_another_service(tmp_path: Path) -> None:
    (tmp_path / "asking.py").write_text(
        "import acomm\n"
        "from workers import task\n"
        "@task\n"
        "def total(url: str, numbers: list[int]) -> int:\n"
        "    with acomm.connect(url) as client:\n"
        "        return client.call('add', *numbers)\n"
        "@task\n"
        "def add(a: int, b: int) -> int:\n"
        "    return a + b\n"
    )
    with Served(tmp_path, modules=("./asking.py",)) as served:
        with acomm.connect(served.url, default_timeout=WAIT) as client:
            assert client.call("total", served.url, [1, 2]) == 3


@pytest.mark.process
@pytest.mark.parametrize(("level", "said"), [("info", True), ("error", False)])
def test_the_log_level_is_obeyed(tmp_path: Path, level: str, said: bool) -> None:
    with Served(tmp_path, "-w", "1", "--log-level", level) as served:
        served.process.terminate()
        assert served.wait() == 0
        assert ("stopping: 0 calls" in served.stderr()) is said
