"""System calls that fail at the Nth time: `shim.c`, compiled at run time, and the page that steers it."""

from __future__ import annotations

import errno
import mmap
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")

_SLOTS = 16
_slot = struct.Struct("8i")  # call, pid, after, times, error, seen, failed, unused
_NAMES = dict(enumerate("write fsync fdatasync open accept fork".split(), 1))
_NUMBERS = {name: number for number, name in _NAMES.items()}


class NoCompiler(Exception):
    """There is nothing to compile the shim with."""


class Shim:
    """Makes calls of processes fail that were started with `environment`. Raises NoCompiler."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise NoCompiler("failing system calls need a C compiler, and there is no cc: install one")
        library = folder / "shim.so"
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoCompiler(f"cc could not compile {SOURCE}: {done.stderr.strip()}")
        path = folder / "shim.page"
        path.write_bytes(bytes(_SLOTS * _slot.size))
        with open(path, "r+b") as file:
            self._page = mmap.mmap(file.fileno(), 0)
        self._next = 0
        self.failed: Counter[str] = Counter()  # of those that were disarmed, by call
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_PAGE": str(path)}

    def arm(self, call: str, error: str, *, pid: int, after: int, times: int = 1) -> int:
        """After so many further calls by the process `pid`, `times` of them fail with `error`, as errno names
        it. The oldest order makes room. Returns what `disarm` takes.
        """
        slot, self._next = self._next, (self._next + 1) % _SLOTS
        self.disarm(slot)
        at = slot * _slot.size
        # The call's number last: it is what makes the others count.
        rest = struct.pack("7i", pid, after, times, getattr(errno, error), 0, 0, 0)
        self._page[at + 4 : at + _slot.size] = rest
        self._page[at : at + 4] = struct.pack("i", _NUMBERS[call])
        return slot

    def disarm(self, slot: int) -> None:
        at = slot * _slot.size
        call, *_, failed, _ = _slot.unpack_from(self._page, at)
        if call:
            self.failed[_NAMES[call]] += failed
        self._page[at : at + 4] = bytes(4)

    def disarm_all(self) -> None:
        for slot in range(_SLOTS):
            self.disarm(slot)
