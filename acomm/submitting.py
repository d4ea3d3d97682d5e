"""How calls are made: by name or by task, with options that views of a client add up."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import msgspec

from acomm.calls import Call, Decode
from acomm.jsontext import encode
from acomm.messages import Handler, Handlers
from acomm.sources import SentStream
from acomm.streamsources import Source


@runtime_checkable
class TaskLike(Protocol):
    """A task that is known by more than its name: it writes its arguments and reads its results."""

    name: str

    def encode_args(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes: ...
    def decode_result(self, raw: Any) -> Any: ...
    def decode_item(self, raw: Any) -> Any: ...


class Sender(Protocol):
    """The client that views make their calls by."""

    def in_own_thread(self) -> bool: ...
    def send(
        self, task: str, args: bytes, options: Options, decode: Decode | None, decode_item: Decode | None
    ) -> Call: ...


class Options(msgspec.Struct, frozen=True):
    """What `using` sets for the calls of a client's view."""

    timeout: float | None = None
    priority: int = 0
    handlers: Handlers | None = None
    stream: SentStream | None = None
    patience: float = 0.0

    def using(
        self,
        *,
        timeout: float | None = None,
        priority: int | None = None,
        on_success: Handler | None = None,
        on_error: Handler | None = None,
        stream: Source | None = None,
        patience: float | None = None,
    ) -> Options:
        """These, except for what is given: see `Submitter.using`."""
        if timeout is not None and not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
        if patience is not None and not 0 <= patience < float("inf"):
            raise ValueError(f"patience must be a number of seconds, not {patience}")
        return Options(
            self.timeout if timeout is None else timeout,
            self.priority if priority is None else priority,
            Handlers.pack(on_success, on_error) or self.handlers,
            self.stream if stream is None else SentStream(stream),
            self.patience if patience is None else patience,
        )

    def over(self, base: Options) -> Options:
        """These, and what they leave open as `base` has it."""
        return Options(
            base.timeout if self.timeout is None else self.timeout,
            self.priority or base.priority,
            self.handlers or base.handlers,
            self.stream or base.stream,
            self.patience or base.patience,
        )


class Submitter:
    """The calls that a client and its views offer."""

    def __init__(self, client: Sender, options: Options) -> None:
        self._client = client
        self._options = options

    def submit(self, task: str | TaskLike, /, *args: Any, **kwargs: Any) -> Call:
        """Send a call; returns at once.

        `task` is a name or a Task. A name takes positional arguments or keywords; a Task, which knows its
        signature, mixes both. Raises TypeError for arguments that do not fit a Task or JSON, RuntimeError
        when the client is closed. What goes wrong later is the Call's error.
        """
        if isinstance(task, str):
            if args and kwargs:
                raise TypeError("a task's name takes positional arguments or keywords, not both")
            given: Any = args or kwargs or None
            encoded = b"null" if given is None else encode(given, "args")
            return self._client.send(task, encoded, self._options, None, None)
        return self._client.send(
            task.name, task.encode_args(args, kwargs), self._options, task.decode_result, task.decode_item
        )

    def call(self, task: str | TaskLike, /, *args: Any, **kwargs: Any) -> Any:
        """Send a call and wait for its result. Raises the task's error as TaskError, and the others as
        `acomm.errors` has them.
        """
        if self._client.in_own_thread():
            raise RuntimeError("a Call's callback cannot wait for a call: its thread brings the answers")
        return self.submit(task, *args, **kwargs).result()

    def using(
        self,
        *,
        timeout: float | None = None,
        priority: int | None = None,
        on_success: Handler | None = None,
        on_error: Handler | None = None,
        stream: Source | None = None,
        patience: float | None = None,
    ) -> View:
        """A view of this client whose calls have these options.

        `timeout` is in seconds from acceptance. Handlers are pickled here and now, and run in the
        supervisor: an unpicklable one raises HandlerError, which names what is in the way.

        `stream` is what the task reads as its request's stream: bytes, which every call of the view sends,
        or for one call a binary file, an iterable of bytes, or an async iterable, which is read in the
        event loop that submits the call. It is closed when it has been read, or the call has ended.

        `patience` is for how many seconds a call that is refused as Busy comes back when it is told to, under
        its id, for which a place is kept; 0 has it fail at once.
        """
        options = self._options.using(
            timeout=timeout,
            priority=priority,
            on_success=on_success,
            on_error=on_error,
            stream=stream,
            patience=patience,
        )
        return View(self._client, options)

    def with_options(self, options: Options) -> View:
        """A view whose calls have `options`, over those of this one."""
        return View(self._client, options.over(self._options))


class View(Submitter):
    """A client with options: see `Submitter.using`. It needs no closing of its own."""
