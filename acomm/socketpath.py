"""Claiming a path for a unix socket: safely, and from nobody who is alive.

asyncio, uvloop and ZeroMQ all bind over a socket file without asking whether somebody serves it. Here
a path is claimed by an exclusive `flock` on `PATH.lock`, and by asking the socket itself, as programs
that know nothing of the lock may own it. What a dead owner left behind is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time

from acomm.errors import AddressInUse, ConfigError, printable
from acomm.urls import MAX_UNIX_PATH

BACKLOG = 4096

_SWEEP_AGE = 60.0
"""Seconds; a younger lock may belong to somebody who has made it and does not hold it yet."""


def runtime_folder() -> str:
    """Where sockets go by default: `$XDG_RUNTIME_DIR/acomm`, else `/tmp/acomm-<uid>`."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(base, "acomm") if base else f"/tmp/acomm-{os.getuid()}"


def private_path(prefix: str, folder: str | None = None) -> str:
    """A new path in `folder` (None: the runtime folder), which is made if need be; nobody else can guess
    the name. Raises ConfigError when the folder is not fit.
    """
    folder = folder or runtime_folder()
    check_folder(folder)
    _sweep(folder, prefix)
    return os.path.join(folder, f"{prefix}-{os.getpid()}-{os.urandom(6).hex()}.sock")


def lasting_path(prefix: str, name: str) -> str:
    """The path in the runtime folder of whoever goes by `name`, always the same. Raises ConfigError when the
    folder is not fit.
    """
    folder = runtime_folder()
    check_folder(folder)
    return os.path.join(folder, f"{prefix}-{name}.sock")


def _sweep(folder: str, prefix: str) -> None:
    """Remove private sockets that dead processes have left: whose lock nobody holds any more."""
    young = time.time() - _SWEEP_AGE
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix + "-") and entry.name.endswith(".sock.lock"):
                with contextlib.suppress(OSError, ConfigError):
                    if entry.stat(follow_symlinks=False).st_mtime < young:
                        path = entry.path.removesuffix(".lock")
                        lock = _lock(path)
                        try:
                            _remove_dead(path)
                        finally:
                            _unlock(path, lock)


def discard(path: str) -> None:
    """Remove what the owner of a private path has left there: it is dead, or is to serve nobody any more."""
    for name in (path, path + ".lock"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def check_folder(folder: str, mode: int = 0o700) -> None:
    """Make `folder` with `mode`, less the umask, if it is missing; refuse one where somebody else could swap
    our socket.

    Raises ConfigError. An existing folder is never chmodded: it is its owner's.
    """
    try:
        _make_folder(folder, mode)
        link, info = os.lstat(folder), os.stat(folder)
    except OSError as error:
        raise ConfigError(f"cannot use the folder {printable(folder)}: {error.strerror}") from None
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.getuid()):
        raise ConfigError(f"{folder} is a link of uid {link.st_uid}, who could lead it elsewhere")
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"{folder} is not a folder")
    if info.st_uid not in (0, os.getuid()):
        raise ConfigError(f"the folder {folder} belongs to uid {info.st_uid}, not to you or root")
    others_write = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others_write and not info.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"others can write to the folder {folder} (mode {stat.S_IMODE(info.st_mode):o}): "
            "choose a folder of your own, or chmod it to 700"
        )


def _make_folder(folder: str, mode: int) -> None:
    """`mkdir -p` that gives every folder `mode`: who may write to a parent may swap what is in it."""
    try:
        os.mkdir(folder, mode)
    except FileExistsError:
        pass
    except FileNotFoundError:
        _make_folder(os.path.dirname(folder), mode)
        with contextlib.suppress(FileExistsError):  # somebody else wants it, too
            os.mkdir(folder, mode)


class BoundSocket:
    """A listening socket, and what it takes to give its path back."""

    def __init__(self, sock: socket.socket, path: str, lock: int) -> None:
        self.socket = sock
        self.path = path
        self._lock = lock
        self._inode = os.stat(path, follow_symlinks=False).st_ino

    def hide(self) -> None:
        """Remove the socket's file, unless another has taken its place: nobody new can connect."""
        try:
            if os.stat(self.path, follow_symlinks=False).st_ino == self._inode:
                os.unlink(self.path)
        except OSError:
            pass  # gone already, or in a folder that is

    @property
    def fds(self) -> tuple[int, int]:
        """The listening socket, and the lock that says whose the path is."""
        return self.socket.fileno(), self._lock

    def forget(self) -> None:
        """Close the socket and the lock, which another process has, too: the path is its own now."""
        self.socket.close()
        os.close(self._lock)

    def release(self) -> None:
        """Give the path back and close the socket."""
        self.hide()
        self.socket.close()
        _unlock(self.path, self._lock)


def bind(path: str, mode: int = 0o600) -> BoundSocket:
    """Listen at `path`.

    Raises AddressInUse when somebody serves it or it is not a socket; ConfigError when the path is too
    long or its folder is not fit.
    """
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise ConfigError(
            f"the socket path is {len(os.fsencode(path))} bytes long, the kernel takes "
            f"{MAX_UNIX_PATH}: {printable(path)}"
        )
    check_folder(os.path.dirname(path))
    lock = _lock(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_dead(path)
        # The file is born with the mode of the socket's own inode, so there is no wider moment.
        os.fchmod(sock.fileno(), mode & 0o700)
        sock.bind(path)
        if mode & 0o077:
            os.chmod(path, mode)
        sock.listen(BACKLOG)
        return BoundSocket(sock, path, lock)
    except OSError as error:
        sock.close()
        _unlock(path, lock)
        if isinstance(error, AddressInUse):
            raise
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{printable(path)} was taken by another program just now") from None
        raise ConfigError(f"cannot listen at {printable(path)}: {error.strerror}") from None


def is_live(path: str) -> bool:
    """Whether a service has `path`: somebody listens there, or holds its lock yet, as one does that ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT):
            return True
    try:
        lock = os.open(path + ".lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def adopt(path: str, mode: int, fds: tuple[int, int]) -> BoundSocket:
    """The listening socket at `path`, and its lock, that another process has given us: `BoundSocket.fds`."""
    sock = socket.socket(fileno=fds[0])
    sock.setblocking(False)
    os.chmod(path, mode)
    return BoundSocket(sock, path, fds[1])


def _lock(path: str) -> int:
    name = path + ".lock"
    while True:
        try:
            lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot open {printable(name)}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise AddressInUse(f"{printable(path)} is in use by a running service") from None
        # Its last owner may have removed the file between our open and our lock.
        try:
            if os.stat(name).st_ino == os.fstat(lock).st_ino:
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _unlock(path: str, lock: int) -> None:
    with contextlib.suppress(OSError):  # gone already, or in a folder that is
        os.unlink(path + ".lock")
    os.close(lock)


def _remove_dead(path: str) -> None:
    try:
        info = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise AddressInUse(f"{printable(path)} exists and is not a socket; it was left as it is")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        outcome = probe.connect_ex(path)
    if outcome != errno.ECONNREFUSED:
        raise AddressInUse(f"{printable(path)} is in use by a running service")
    if info.st_uid not in (0, os.getuid()):
        raise AddressInUse(f"{printable(path)} was left by uid {info.st_uid}; remove it first")
    os.unlink(path)


def default_socket() -> str:
    """The supervisor's socket: `$ACOMM_SOCKET`, else `acomm.sock` in the runtime folder."""
    return os.environ.get("ACOMM_SOCKET") or os.path.join(runtime_folder(), "acomm.sock")
