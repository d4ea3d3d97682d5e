"""Time that passes on from one supervisor to the next: nobody works for longer than the first one waits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import WAIT
from serving import Fifo, Hook, Served, request

import acomm
from acomm.errors import CallTimeout

pytestmark = pytest.mark.process

TASKS = """
import os
import time
import acomm
from servedtasks import stay
from workers import context, task

__all__ = ["stay"]


def rest() -> float | None:
    due = context().deadline
    return None if due is None else due - time.monotonic()


@task
def hop(urls: list[str], asks: float | None = None, detached: bool = False) -> list[float | None]:
    if not urls:
        return [rest()]
    with acomm.connect(urls[0]) as client:
        further = client.using(timeout=asks)
        if detached:
            with acomm.detached():
                return [rest(), *further.call("hop", urls[1:])]
        return [rest(), *further.call("hop", urls[1:])]


@task
async def hop_too(urls: list[str]) -> list[float | None]:
    if not urls:
        return [rest()]
    async with acomm.connect(urls[0]) as client:
        return [rest(), *await client.submit("hop_too", urls[1:])]


@task
def stay_there(url: str, started: str) -> None:
    with acomm.connect(url) as client:
        client.call("stay", started)
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Served, Served]]:
    """Two supervisors, each of which serves the same tasks."""
    module = tmp_path / "hopping.py"
    module.write_text(TASKS)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    with (
        Served(folders[0], modules=(str(module),)) as first,
        Served(folders[1], modules=(str(module),)) as second,
    ):
        yield first, second


@pytest.fixture
def client(pair: tuple[Served, Served]) -> Iterator[acomm.Client]:
    with acomm.connect(pair[0].url, default_timeout=2 * WAIT) as client:
        yield client


@pytest.mark.parametrize("task", ["hop", "hop_too"])
def test_each_has_what_the_one_before_has_left(
    pair: tuple[Served, Served], client: acomm.Client, task: str
) -> None:
    first, second = pair
    lefts = client.using(timeout=WAIT).call(task, [second.url, first.url])
    assert len(lefts) == 3
    assert WAIT > lefts[0] > lefts[1] > lefts[2] > 0
    assert client.call(task, [second.url]) == [None, None]


def test_what_a_call_asks_for_counts_if_it_is_less(pair: tuple[Served, Served], client: acomm.Client) -> None:
    _, second = pair
    limited = client.using(timeout=WAIT)
    assert limited.call("hop", [second.url], 1000.0)[1] < WAIT
    assert limited.call("hop", [second.url], 5.0)[1] < 5
    assert client.call("hop", [second.url], 5.0)[1] < 5
    assert limited.call("hop", [second.url], 1000.0, True)[1] > WAIT, "detached"


def test_a_request_that_is_passed_on_keeps_its_time(pair: tuple[Served, Served], tmp_path: Path) -> None:
    """To the service at its task URL, through a supervisor that does not do it itself."""
    first, second = pair
    with Hook(tmp_path / "hook") as hook:
        message = request("a", "hop", hook.url, [[]], acomm=1, timeout=WAIT, taskURL=second.url)
        assert json.loads(first.ask(message))["error"] == ""
        (left,) = hook.answer()["result"]
        assert 0 < left < WAIT


def test_the_last_one_ends_when_the_first_has_no_time_left(
    pair: tuple[Served, Served], client: acomm.Client, started: Fifo
) -> None:
    """By its own limit: the one before may be dead by then, and tells it nothing."""
    first, second = pair
    call = client.using(timeout=3).submit("stay_there", second.url, started.path)
    started.read()
    with pytest.raises(CallTimeout):
        call.result(WAIT)
    stats = second.until(lambda stats: not stats["assigned"])
    assert stats["counts"]["timeout"] == 1
    assert first.until(lambda stats: not stats["assigned"])["counts"]["timeout"] == 1
