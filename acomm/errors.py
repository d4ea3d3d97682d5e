"""Every error that acomm raises or puts on the wire: one root, one sentence a class.

An error that can travel has a `code`. The code is the contract between programs; the text is for
people. On the wire the text is the `error` string of a response or acknowledgement, and the rest
travels as the extension key `error_info` to peers that asked for it.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

E = TypeVar("E", bound=BaseException)

MAX_TEXT = 2000
"""Characters of a message that travel: enough to understand a fault, too little to flood a log."""


class AcommError(Exception):
    """Root of all errors of this library; as such, an error that carries no known code.

    `code` names the kind, `type` the exception class that the task raised, `traceback` its text,
    `receipt` what is known of its worker's end, `retry_after` the seconds to wait when `busy`.
    `str()` is the text on the wire.
    """

    code: ClassVar[str] = "error"

    def __init__(
        self,
        message: str = "",
        *,
        type: str | None = None,
        traceback: str | None = None,
        receipt: dict[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.traceback = traceback
        self.receipt = receipt
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.message!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AcommError) and (self.code, self.info()) == (other.code, other.info())

    def __hash__(self) -> int:
        return hash((self.code, self.message))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.__class__, self.message, self.__dict__)

    def info(self) -> dict[str, Any]:
        """The `error_info` object: `code`, `message` and whatever else is known."""
        info: dict[str, Any] = {"code": self.code, "message": self.message}
        for key in ("type", "traceback", "receipt", "retry_after"):
            value = getattr(self, key)
            if value is not None:
                info[key] = value
        return info


def _rebuild(cls: type[AcommError], message: str, state: dict[str, Any]) -> AcommError:
    error = cls.__new__(cls, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error


class BadRequest(AcommError, ValueError):
    """The message could not be understood: invalid JSON, a missing or wrongly typed key."""

    code = "bad_request"


class UnknownTask(AcommError):
    """No task of that name is served here."""

    code = "unknown_task"


class BadArgs(AcommError):
    """The arguments do not fit the task's parameters."""

    code = "bad_args"


class Busy(AcommError):
    """The service takes no more work now; `retry_after` says when to come back, in seconds."""

    code = "busy"


class Conflict(AcommError):
    """The id is in use, or was used, for a request with other content."""

    code = "conflict"


class Forbidden(AcommError):
    """The peer may not do that."""

    code = "forbidden"


class TaskError(AcommError):
    """The task raised; `type` and `traceback` tell what and where."""

    code = "task_error"


class WorkerLost(AcommError):
    """The worker process died while it ran the call; `receipt` tells how."""

    code = "worker_lost"


class Poisoned(AcommError):
    """The call has killed its quota of workers and is not tried again."""

    code = "poisoned"


class CallTimeout(AcommError, TimeoutError):
    """The time limit of the request or of the task has passed."""

    code = "timeout"


class CallCancelled(AcommError):
    """The call was cancelled by its caller or by an operator."""

    code = "cancelled"


class TooLarge(AcommError):
    """A message or a result is larger than the limit."""

    code = "too_large"


class ShuttingDown(AcommError):
    """The service is stopping and takes no new requests."""

    code = "shutting_down"


class ConnectionLost(AcommError, ConnectionError):
    """The peer could not be reached, went away, or did not acknowledge in time.

    It never travels: whoever raises it knows only that no acknowledgement was seen, so the peer may
    or may not have the message.
    """

    code = "connection_lost"


class Unreachable(ConnectionLost):
    """Nobody is there to connect to: the peer has nothing of the message, and it may be sent again."""


class HandlerError(AcommError):
    """A handler cannot be pickled, or not be loaded where it should run."""

    code = "bad_request"


class AddressInUse(AcommError, OSError):
    """A socket path is held by a live process, or by something that is not a socket."""

    code = "address_in_use"


class ConfigError(AcommError, ValueError):
    """A setting, a module, a task or a path is not usable; found at start."""

    code = "config"


WIRE_ERRORS: dict[str, type[AcommError]] = {
    cls.code: cls
    for cls in (
        BadRequest,
        UnknownTask,
        BadArgs,
        Busy,
        Conflict,
        Forbidden,
        TaskError,
        WorkerLost,
        Poisoned,
        CallTimeout,
        CallCancelled,
        TooLarge,
        ShuttingDown,
    )
}
"""Code to class, for every error that travels."""

_MAX_RETRY_AFTER = 1e9  # seconds; about thirty years


def from_wire(text: str, info: dict[str, Any] | None = None) -> AcommError:
    """The error that a response or acknowledgement carries.

    `text` is the `error` string; `info` the `error_info` object of a peer that sent one. Unknown
    codes and wrongly typed parts are ignored, as the text alone is still worth having.
    """
    info = info or {}
    code = info.get("code")
    cls = WIRE_ERRORS.get(code, AcommError) if isinstance(code, str) else AcommError
    receipt = info.get("receipt")
    return cls(
        text,
        type=_text_or_none(info.get("type")),
        traceback=_text_or_none(info.get("traceback")),
        receipt=receipt if isinstance(receipt, dict) else None,
        retry_after=_seconds_or_none(info.get("retry_after")),
    )


def _seconds_or_none(value: object) -> float | None:
    # Compared as it is: an integer may be too large for a float.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_RETRY_AFTER:
        return float(value)
    return None


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def alone(error: E) -> E:
    """`error` without its traceback and the error that it came of. Those hold the frames that it was raised
    in, and their callers: where one of them leads to who keeps the error, all that was at hand there, a
    message of many MB maybe, would stay until garbage is looked for.
    """
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def printable(value: object, limit: int = 200) -> str:
    """`value` as one safe line for a message or a log: control characters escaped, cut at `limit`."""
    text = value if isinstance(value, str) else str(value)
    if len(text) > limit:
        text = text[:limit] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "backslashreplace").decode("ascii")
