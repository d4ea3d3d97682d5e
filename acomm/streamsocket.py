"""One-shot stream sockets: what their producers and readers have in common. The protocol is told in
`acomm.streams`.
"""

from __future__ import annotations

import os
import socket
import struct

from acomm import socketpath

EXPIRY = 60.0
"""Seconds that a stream waits for its consumer."""

CHUNK = 128 * 1024
ACCEPT_PAUSE = 0.1
"""Seconds until the next try to accept, when the process is out of descriptors."""

BYTE = b"\n"
"""What a reader sends, and a producer that is done reads."""

_KIND = "checked-stream"
_ucred = struct.Struct("iII")


def bind(folder: str | None, mode: int = 0o600) -> socketpath.BoundSocket:
    """Listen at a new path in `folder` (None: the runtime folder). Raises ConfigError."""
    return socketpath.bind(socketpath.private_path(_KIND, folder), mode)


def discard(path: str) -> None:
    """Remove what a producer that was killed may have left at `path`."""
    if is_checked(path):
        socketpath.discard(path)


def is_checked(path: str) -> bool:
    """Whether the producer at `path` expects a byte from its reader."""
    return os.path.basename(path).startswith(f"{_KIND}-")


def peer(sock: socket.socket) -> tuple[int, int]:
    """The pid and uid of who connected, by the kernel's word."""
    pid, uid, _ = _ucred.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size))
    return pid, uid
