"""What tests of the egress policy watch: connections, DNS, and other users' sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be other users")


class Wire:
    """What the process does with sockets while it is watched; a sealed one lets nothing out."""

    def __init__(self, *, sealed: bool) -> None:
        self.sealed = sealed
        self.connects: list[tuple[str, int]] = []
        self.lookups: list[str] = []

    def event(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect" and args[0].family != socket.AF_UNIX:
            self.connects.append(args[1][:2])
            if self.sealed:
                raise ConnectionRefusedError("the wire is sealed")
        elif event == "socket.getaddrinfo":
            self.lookups.append(args[0])


_watching: list[Wire] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event.startswith("socket."):
        _watching[-1].event(event, args)


sys.addaudithook(_audit)  # for good: audit hooks cannot be taken off


@contextlib.contextmanager
def watched(*, sealed: bool = False) -> Iterator[Wire]:
    _watching.append(wire := Wire(sealed=sealed))
    try:
        yield wire
    finally:
        _watching.pop()


class Names:
    """DNS for a test: a name's answers, one set after the other; the last one stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[tuple[str, ...]]] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self.getaddrinfo)

    async def getaddrinfo(self, host: str, port: int, **options: Any) -> list[Any]:
        sets: list[tuple[str, ...]] | None
        if host.replace(".", "").isdigit() or ":" in host:
            sets = [(host,)]  # uvloop asks for addresses, too, before it connects to them
        else:
            self.asked.append(host)
            sets = self.answers.get(host.lower())
        if sets is None:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        found = sets.pop(0) if len(sets) > 1 else sets[0]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in found
        ]


_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
sock = socket.socket(socket.AF_UNIX)
sock.bind({path!r})
sock.listen()
print("listening", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def stranger(path: Path, uid: int = NOBODY) -> Iterator[None]:
    """Another user's process that listens at `path`."""
    code = _STRANGER.format(uid=uid, path=str(path))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"listening\n"
            yield
        finally:
            child.stdin.close()
