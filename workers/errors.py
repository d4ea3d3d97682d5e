"""The errors of the protocol library, under the name that worker code imports, and one that tasks see."""

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
    from_wire,
    printable,
)

__all__ = [
    "AcommError",
    "AddressInUse",
    "BadArgs",
    "BadRequest",
    "Busy",
    "CallCancelled",
    "CallTimeout",
    "ConfigError",
    "Conflict",
    "ConnectionLost",
    "Forbidden",
    "HandlerError",
    "Poisoned",
    "ShuttingDown",
    "SoftTimeout",
    "TaskError",
    "TooLarge",
    "UnknownTask",
    "WorkerLost",
    "from_wire",
    "printable",
]


class SoftTimeout(CallTimeout):
    """Raised within a task when its `soft_timeout` has passed. If the task lets it out, the caller gets a
    `timeout`.
    """
