"""Where a journal's file may be, and whose: private, held by one supervisor, on a disk of this host. All
raise ConfigError, which says how to go on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

import psutil

from workers.errors import ConfigError, printable

_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "afs", "ceph", "glusterfs"}
"""File systems of other hosts, whose locks and shared memory are not to be trusted with a WAL."""


def lock(path: str) -> int:
    """Hold `PATH.lock`: two supervisors at one journal would run everything twice."""
    try:
        fd = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use the journal {printable(path)}: {error.strerror}") from None
    return _flock(fd, path)


def _flock(fd: int, path: str) -> int:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise ConfigError(f"cannot lock the journal {printable(path)}: {error.strerror}") from None
        raise ConfigError(
            f"the journal {printable(path)} is in use by another supervisor: stop it, or name another file"
        ) from None
    return fd


def make_private(path: str) -> int:
    """Make the file with mode 0600, or see that nobody else may read or change it: it holds pickled handlers,
    which we run. Holds it, as well as its lock file, which somebody may tidy away.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use the journal {printable(path)}: {error.strerror}") from None
    info = os.fstat(fd)
    fault = None
    if not stat.S_ISREG(info.st_mode):
        fault = f"the journal {printable(path)} is not a file"
    elif info.st_uid != os.getuid():
        fault = f"the journal {printable(path)} belongs to uid {info.st_uid}, not to you"
    elif info.st_mode & 0o077:
        mode = stat.S_IMODE(info.st_mode)
        fault = f"others may use the journal {printable(path)} (mode {mode:o}): chmod it to 600"
    if fault is not None:
        os.close(fd)
        raise ConfigError(fault)
    return _flock(fd, path)


def check_local(path: str) -> None:
    """Refuse the file systems of other hosts."""
    folder = os.path.realpath(os.path.dirname(path))
    mounts = [
        part
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath([part.mountpoint, folder]) == part.mountpoint
    ]
    where = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    if where is not None and where.fstype.lower() in _REMOTE:
        raise ConfigError(
            f"the journal {printable(path)} is on a {where.fstype} file system, whose locks do not hold: "
            "name a file on a disk of this host"
        )
