"""A task with options for its calls: `task.using(...)`, still called as the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

# Loaded where used: most programs that import tasks submit none.
if TYPE_CHECKING:
    from acomm.calls import Call
    from acomm.messages import Handler
    from acomm.streamsources import Source
    from acomm.submitting import Options, Submitter

P = ParamSpec("P")
R = TypeVar("R")


class Submittable(Protocol):
    """What a client asks of a task; see `acomm.submitting.TaskLike`."""

    name: str

    def encode_args(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes: ...
    def decode_result(self, raw: Any) -> Any: ...
    def decode_item(self, raw: Any) -> Any: ...


class TaskView(Generic[P, R]):
    """The calls of a task, by a client and with options: see `Task.using`."""

    def __init__(
        self,
        task: Submittable,
        function: Callable[P, R],
        options: Options | None = None,
        client: Submitter | None = None,
    ) -> None:
        self._task = task
        self._function = function
        self._options = options
        self._client = client

    def __repr__(self) -> str:
        return f"<TaskView of {self._task!r}>"

    @property
    def name(self) -> str:
        """The task's."""
        return self._task.name

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*args, **kwargs)

    def submit(self, /, *args: P.args, **kwargs: P.kwargs) -> Call:
        """Have a worker run the task; returns at once. See `Task.submit`."""
        client = self._client
        if client is None:
            from acomm.defaultclient import default_client

            client = default_client()
        if self._options is not None:
            client = client.with_options(self._options)
        return client.submit(self._task, *args, **kwargs)

    def using(
        self,
        *,
        timeout: float | None = None,
        priority: int | None = None,
        on_success: Handler | None = None,
        on_error: Handler | None = None,
        stream: Source | None = None,
        patience: float | None = None,
        client: Submitter | None = None,
    ) -> TaskView[P, R]:
        """A view with these options besides its own. See `Task.using`."""
        from acomm.submitting import Options

        options = (self._options or Options()).using(
            timeout=timeout,
            priority=priority,
            on_success=on_success,
            on_error=on_error,
            stream=stream,
            patience=patience,
        )
        return TaskView(self._task, self._function, options, client or self._client)
