"""Calls whose supervisor dies while they are under way: where a journal keeps them, they are answered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from peers import WAIT
from serving import Fifo, Served, kill

from acomm import connect, errors
from acomm.acks import ok_ack, stored_ack


def test_the_acknowledgement_of_what_is_stored() -> None:
    plain = ok_ack(b'"x"', 3, True)
    assert stored_ack(plain) == plain[:-1] + b',"stored":true}'


@pytest.mark.process
def test_the_next_supervisor_answers_what_was_stored(tmp_path: Path, started: Fifo) -> None:
    tmp_path.chmod(0o700)
    journal = ("--journal", str(tmp_path / "j.db"))
    os.mkfifo(tmp_path / "release")
    with Served(tmp_path, *journal) as first, connect(first.url, wait=0) as client:
        held = client.submit("hold", started.path, f"{tmp_path}/release")
        started.read()
        waiting = [client.submit("add", number, 1) for number in range(100)]
        assert [call.result(WAIT) for call in waiting] == list(range(1, 101))
        kill(first.pid)
        first.wait()
        with pytest.raises(TimeoutError):
            held.result(1.0)  # longer than a call that is not stored is waited for
        with Served(tmp_path, *journal):
            started.read()
            (tmp_path / "release").write_text("")
            held.result(WAIT)


@pytest.mark.process
def test_which_are_known(tmp_path: Path, started: Fifo) -> None:
    os.mkfifo(tmp_path / "release")
    with Served(tmp_path) as served, connect(served.url, wait=0) as client:
        held = client.submit("hold", started.path, f"{tmp_path}/release")
        started.read()
        done = client.submit("add", 1)
        done.result(WAIT)
        assert set(client.call("acomm.known", [held.id, done.id, "other"])) == {held.id, done.id}
        with pytest.raises(errors.BadArgs):
            client.call("acomm.known", 1)
        (tmp_path / "release").write_text("")
        held.result(WAIT)
