"""A disk for the journal that can be full: a file system of its own if we may mount one, else the shim."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

from chaoslib.shim import Shim

SIZE = 512
"""MiB: more than the journal of a long run takes."""


_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_DETACH = 2


class NoDisk(Exception):
    """There is no way to have a full disk here."""


class Disk:
    """The folder `path`, which exists while this is open. Raises NoDisk if it can never be full, unless that
    is not `wanted`.
    """

    def __init__(self, path: Path, shim: Shim | None, *, wanted: bool) -> None:
        self.path = path
        self._shim = shim
        self._slot: int | None = None
        path.mkdir(mode=0o700)
        self.mounted = wanted and self._mount()
        if wanted and not self.mounted and shim is None:
            raise NoDisk("a full disk needs the right to mount one (root), or a C compiler for the shim")

    def _mount(self) -> bool:
        """Mount it where only we and our children see it, so that it ends with us, whatever we die of."""
        if os.getuid() != 0:
            return False
        libc = ctypes.CDLL(None)
        if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
            return False
        options = f"size={SIZE}m,mode=700".encode()
        return libc.mount(b"chaos", os.fsencode(self.path), b"tmpfs", 0, options) == 0

    def fill(self, pid: int) -> None:
        """Leave no room, for the supervisor `pid` at least."""
        if not self.mounted:
            assert self._shim is not None
            self._slot = self._shim.arm("write", "ENOSPC", pid=pid, after=0, times=2**30)
            return
        with open(self.path / "ballast", "wb", buffering=0) as ballast:
            size = 1024 * 1024
            while size:
                try:
                    ballast.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2

    def free(self) -> None:
        if self._shim is not None and self._slot is not None:
            self._shim.disarm(self._slot)
            self._slot = None
        with contextlib.suppress(FileNotFoundError):
            (self.path / "ballast").unlink()

    def close(self) -> None:
        self.free()
        if self.mounted:
            ctypes.CDLL(None).umount2(os.fsencode(self.path), _MNT_DETACH)
