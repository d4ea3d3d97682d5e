"""launch(): a supervisor of one's own, as a child process, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from acomm.client import Client, connect
from acomm.urls import unix_url
from workers.config import Config
from workers.errors import ConfigError

START_TIMEOUT = 60.0
_KILL_AFTER = 5.0
"""Seconds beyond the drain timeout until a supervisor that does not end is killed."""


@contextmanager
def launch(*modules: str, **settings: Any) -> Iterator[Client]:
    """Run a supervisor for `modules` on a private socket, and connect to it.

        with launch("app.tasks", workers=4) as client:
            print(client.call("add", 1, 2))

    The settings are those of `Config`. At the end the supervisor drains and ends; it does so too when
    this process dies. Raises ConfigError when it does not start; its stderr says why.
    """
    # A socket's path is short, and some people's folder for temporary files is not.
    parent = tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) <= 70 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="acomm-", dir=parent) as folder:
        settings.setdefault("socket", str(Path(folder, "acomm.sock")))
        config = Config.load({"modules": modules, **settings}, environ={})
        with _notify_socket(Path(folder, "notify")) as ready:
            child = _start(config, Path(folder, "notify"))
            try:
                _wait_until_ready(child, ready)
                with connect(unix_url(config.socket)) as client:
                    yield client
            finally:
                _end(child, config.drain_timeout + _KILL_AFTER)


def _start(config: Config, notify: Path) -> subprocess.Popen[bytes]:
    # All settings at once, so that none is forgotten, and nothing of the environment's is taken for one.
    settings = msgspec.json.encode(config).decode()
    command = [sys.executable, "-m", "workers", *config.modules, "--until-eof", "--log-level", "warning"]
    # The modules are found there as they would be here.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [*command, "--settings", settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "NOTIFY_SOCKET": str(notify), "PYTHONPATH": path},
    )


@contextmanager
def _notify_socket(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        yield sock


def _wait_until_ready(child: subprocess.Popen[bytes], ready: socket.socket) -> None:
    ready.settimeout(0.05)
    waited = 0.0
    while waited < START_TIMEOUT:
        with suppress(TimeoutError):
            if ready.recv(4096) == b"READY=1":
                return
        if child.poll() is not None:
            raise ConfigError(f"the supervisor ended with status {child.returncode} while it started")
        waited += 0.05
    raise ConfigError(f"the supervisor was not ready within {START_TIMEOUT:g} seconds")


def _end(child: subprocess.Popen[bytes], timeout: float) -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
