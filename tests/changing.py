"""Code that changes while a supervisor serves it."""

from __future__ import annotations

from pathlib import Path

import psutil
from peers import WAIT
from serving import Served

from acomm.client import Client

CODE = """
import os
from helper import NAME
from workers import task

@task
def version() -> str:
    return f"{{NAME}} {number}"

@task
def hold(told: str, go: str) -> str:
    with open(told, "w") as file:
        file.write("running")
    with open(go) as file:
        file.read(1)
    return "{number}"

@task
def note(path: str, text: str) -> str:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (text + chr(10)).encode())
    os.close(file)
    return text

{more}
"""


class App:
    """A module that changes. Each version has another size, so that no compiled one passes for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "helper.py").write_text("NAME = 'version'\n")
        self.write(1)

    def write(self, number: int, more: str = "") -> None:
        padding = "#" * number
        (self.folder / "app.py").write_text(CODE.format(number=number, more=more) + padding + "\n")


def versions(client: Client, calls: int = 20) -> set[str]:
    return {call.result(WAIT) for call in [client.submit("version") for _ in range(calls)]}


def settled(served: Served) -> None:
    """Wait until all past workers and templates are gone: two workers, and their template."""
    process = psutil.Process(served.pid)
    served.until(lambda stats: len(stats["workers"]) == 2 and len(process.children(recursive=True)) == 3)
