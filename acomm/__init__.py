"""acomm: asynchronous communication between services on one host, over unix sockets and HTTP.

A Request names a task, its arguments and a response hook; a Tracker matches the Response that is
pushed to the hook to its request and runs the success or error handler. The wire is that of the Go
library of the same name, in all its generations. This package knows nothing of workers; see `workers`
for the supervisor and its process pool.
"""

from acomm.channel import send, send_sync
from acomm.client import Call, Client, connect
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
    WorkerLost,
)
from acomm.listener import Connection, Peer, UnixListener, send_conn_data, unmarshal_conn_data
from acomm.messages import Handlers, Request, Response
from acomm.tracker import Tracker

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
    "Peer",
    "Poisoned",
    "Request",
    "Response",
    "ShuttingDown",
    "TaskError",
    "TooLarge",
    "Tracker",
    "UnixListener",
    "UnknownTask",
    "WorkerLost",
    "connect",
    "send",
    "send_conn_data",
    "send_sync",
    "unmarshal_conn_data",
]
