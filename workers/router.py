"""The socket that a pool and its workers talk through: ZeroMQ's ROUTER, in a folder of its own.

Its descriptor is edge-triggered, and a send may eat the edge of what has come in: whoever polls it receives
until it is no longer `readable`, and asks again after each send.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import zmq

_DESCRIPTORS = 32
"""Those that the start takes, and some more."""

# As plain integers: zmq's enumerations take microseconds.
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


class Router:
    """Bound when it is made, at `endpoint`, a socket in `folder`. A send sets `sent`, for whoever clears it.
    Raises OSError.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as made:
            _check_descriptors()
            self.folder = _private_folder()
            made.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._context = zmq.Context(io_threads=1)
            self._socket = self._context.socket(zmq.ROUTER)
            made.callback(self._close_socket)  # both at once: a context waits for its sockets, for ever
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._socket.setsockopt(zmq.SNDHWM, 0)  # credit is the limit
            self._socket.setsockopt(zmq.RCVHWM, 0)
            self.endpoint = f"ipc://{self.folder}/pool.sock"
            self._socket.bind(self.endpoint)
            self.sent = False
            self._resources = made.pop_all()

    def close(self) -> None:
        """Close it, and remove the folder."""
        self._resources.close()

    def _close_socket(self) -> None:
        self._socket.close()
        self._context.term()

    def fileno(self) -> int:
        """Readable, once, when something has come in."""
        return self._socket.FD

    def readable(self) -> int:
        """Whether a message has come in."""
        # The socket's word costs a third of the exception that a receive in vain raises.
        return self._socket.getsockopt(_EVENTS) & _POLLIN  # type: ignore[operator]

    def receive(self) -> tuple[bytes, bytes]:
        """The next message, and behind whose identity."""
        identity, message = self._socket.recv_multipart(_NOBLOCK)[:2]
        return identity, message

    def receive_from(self) -> tuple[bytes, bytes, int]:
        """As `receive`, and the pid at the other end; 0 if that is another user's."""
        sender, frame = self._socket.recv_multipart(_NOBLOCK, copy=False)[:2]  # only whole frames tell
        return sender.bytes, frame.bytes, _peer_pid(frame)

    def send(self, identity: bytes, message: bytes) -> bool:
        """False if there is nobody of that identity, or no more."""
        self.sent = True
        try:
            self._socket.send(identity, _NOBLOCK_MORE)
            self._socket.send(message, _NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def is_connected(self, identity: bytes) -> bool:
        """Whether ZeroMQ still has a pipe for a peer; a dead one's goes when all of it has been read."""
        self.sent = True
        try:
            self._socket.send_multipart([identity, b""], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True


def _peer_pid(frame: zmq.Frame) -> int:
    """The pid at the other end of an ipc connection, by the kernel's word (`localhost:uid:gid:pid`); 0 if
    its uid is not ours.
    """
    try:
        _, uid, _, pid = str(frame.get("Peer-Address")).rsplit(":", 3)
        return int(pid) if int(uid) == os.getuid() else 0
    except (zmq.ZMQError, ValueError):
        return 0


def _check_descriptors() -> None:
    """Raise OSError if few are left: libzmq aborts the whole program when it runs out while it starts."""
    with contextlib.ExitStack() as spare:
        for _ in range(_DESCRIPTORS):
            spare.callback(os.close, os.eventfd(0))


def _private_folder() -> str:
    """A new folder, ours alone (0700), with a path short enough for a socket in it."""
    folder = tempfile.mkdtemp(prefix="acomm-pool-")
    if len(os.fsencode(folder)) > 80:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="acomm-pool-", dir="/tmp")
    return folder
