"""acomm: asynchronous communication between services on one host, over unix sockets and HTTP.

A Request names a task, its arguments and a response hook; a Tracker matches the Response that is
pushed to the hook to its request and runs the success or error handler. The wire is that of the Go
library of the same name, in all its generations. This package knows nothing of workers; see `workers`
for the supervisor and its process pool.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from acomm.errors import (
    AcommError,
    AddressInUse,
    BadArgs,
    BadRequest,
    Busy,
    CallCancelled,
    CallTimeout,
    ConfigError,
    Conflict,
    ConnectionLost,
    Forbidden,
    HandlerError,
    Poisoned,
    ShuttingDown,
    TaskError,
    TooLarge,
    UnknownTask,
    Unreachable,
    WorkerLost,
)

if TYPE_CHECKING:
    from acomm.calls import Call, Progress
    from acomm.channel import send, send_sync
    from acomm.client import Client, connect
    from acomm.connection import Connection, Peer
    from acomm.defaultclient import default_client
    from acomm.itemstream import Stream
    from acomm.listener import UnixListener, send_conn_data, unmarshal_conn_data
    from acomm.messages import Handlers, Request, Response
    from acomm.multi import MultiRequest, gather
    from acomm.streamreaders import open_stream, stream
    from acomm.tracker import Tracker
    from acomm.within import detached

# Loaded when they are first used: many programs, workers among them, need none of these.
_homes = {
    name: f"acomm.{module}"
    for module, names in {
        "calls": "Call Progress",
        "channel": "send send_sync",
        "client": "Client connect",
        "defaultclient": "default_client",
        "itemstream": "Stream",
        "connection": "Connection Peer",
        "listener": "UnixListener send_conn_data unmarshal_conn_data",
        "messages": "Handlers Request Response",
        "multi": "MultiRequest gather",
        "streamreaders": "open_stream stream",
        "tracker": "Tracker",
        "within": "detached",
    }.items()
    for name in names.split()
}

__all__ = [
    "AcommError",
    "AddressInUse",
    "BadArgs",
    "BadRequest",
    "Busy",
    "Call",
    "CallCancelled",
    "CallTimeout",
    "Client",
    "ConfigError",
    "Conflict",
    "Connection",
    "ConnectionLost",
    "Forbidden",
    "HandlerError",
    "Handlers",
    "MultiRequest",
    "Peer",
    "Poisoned",
    "Progress",
    "Request",
    "Response",
    "ShuttingDown",
    "Stream",
    "TaskError",
    "TooLarge",
    "Tracker",
    "UnixListener",
    "UnknownTask",
    "Unreachable",
    "WorkerLost",
    "connect",
    "default_client",
    "detached",
    "gather",
    "open_stream",
    "send",
    "send_conn_data",
    "send_sync",
    "stream",
    "unmarshal_conn_data",
]


def __getattr__(name: str) -> Any:
    if name not in _homes:
        raise AttributeError(f"module 'acomm' has no attribute {name!r}")
    value = getattr(import_module(_homes[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_homes]
