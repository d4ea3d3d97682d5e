"""Which tasks are served: the `@task` decorator, and the registry that collects what it marked.

There is no global registry. `@task` returns a `Task`, which is still the function when called;
`Registry.from_modules` imports the modules that it is given and takes the tasks that it finds in
them, checking once, at start, whatever can be checked then.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from acomm.jsontext import encode
from acomm.messages import RESERVED
from workers import callkey, options
from workers.callkey import CallKey
from workers.errors import ConfigError, TaskError, TooLarge, printable
from workers.importing import Importer, place
from workers.options import Retry, checked
from workers.signature import Bound, Parameters, RawArgs
from workers.taskview import TaskView

if TYPE_CHECKING:
    from acomm.calls import Call
    from acomm.messages import Handler
    from acomm.streamsources import Source
    from acomm.submitting import Submitter

_OPTIONS = (
    "name",
    "timeout",
    "soft_timeout",
    "priority",
    "retry",
    "concurrency",
    "key",
    "isolated",
    "max_memory",
    "cancel_on_disconnect",
)
"""What `@task` takes, and a Task keeps as attributes."""

P = ParamSpec("P")
R = TypeVar("R")


class Task(Generic[P, R]):
    """A function that can be called by name from other processes; here it is called as ever.

    `name` is what callers send, `function` what runs, `module` where it is imported from,
    `location` where it is written ("app/tasks.py:12"). `timeout` is in seconds per attempt. `streams`:
    the function is a generator's, plain or asynchronous, and its items go to the caller one by one.
    `overlaps`: it is a coroutine's, and a worker runs many calls of it at a time. Made by `@task`, which
    explains the rest.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        timeout: float | None = None,
        soft_timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        concurrency: int | None = None,
        key: str | Sequence[str] | None = None,
        isolated: bool = False,
        max_memory: int | None = None,
        cancel_on_disconnect: bool = False,
    ) -> None:
        _check_function(function)
        # First, as it copies the function's own attributes, which must not replace ours.
        functools.update_wrapper(self, function)
        self.function = function
        self.name = _checked_name(getattr(function, "__name__", "") if name is None else name)
        if retry is not None and not isinstance(retry, Retry):
            raise ValueError(f"task {self.name}: retry must be a Retry, not {retry!r}")
        self.is_coroutine = inspect.iscoroutinefunction(function)
        self.streams = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        given = {
            "timeout": timeout,
            "soft_timeout": soft_timeout,
            "priority": priority,
            "concurrency": concurrency,
            "key": key,
            "isolated": isolated,
            "max_memory": max_memory,
            "cancel_on_disconnect": cancel_on_disconnect,
        }
        run = checked(self.name, given, streams=self.streams)
        self.timeout = run.timeout
        self.soft_timeout = run.soft_timeout
        self.priority = run.priority
        self.retry = retry
        self.concurrency = run.concurrency
        self.key = run.key
        self.isolated = run.isolated
        self.max_memory = run.max_memory
        self.cancel_on_disconnect = run.cancel_on_disconnect
        # Not with others in its process: those options are for all that runs there.
        self.overlaps = self.is_coroutine and not self.isolated and self.max_memory is None
        self._call_key: CallKey | None = None
        if self.key is not None:
            try:
                self._call_key = CallKey(function, self.key)
            except ValueError as error:
                raise ValueError(f"task {self.name}: {error}") from None
        self.module: str = getattr(function, "__module__", None) or "?"
        code = getattr(inspect.unwrap(function), "__code__", None)
        self.location = place(code.co_filename, code.co_firstlineno) if code else self.module

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def submit(self, /, *args: P.args, **kwargs: P.kwargs) -> Call:
        """Have a worker run it; returns at once, with a Call to wait for or to await.

        It goes through `acomm.default_client()`; inside a task, to the supervisor that runs that task. A task
        that waits for another one keeps its worker meanwhile, so as many as there are workers wait for ever.
        Raises TypeError for arguments that do not fit.
        """
        return TaskView(self, self.function).submit(*args, **kwargs)

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
        """A view of the task whose calls have these options; it is still called as the function.

            thumbnail.using(timeout=5, on_success=store).submit(path)

        They are those of `Client.using`, and `client`, None for the default one.
        """
        return TaskView(self, self.function).using(
            timeout=timeout,
            priority=priority,
            on_success=on_success,
            on_error=on_error,
            stream=stream,
            patience=patience,
            client=client,
        )

    def __repr__(self) -> str:
        return f"<Task {self.name} {self.location}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By reference, as functions are. The plain function could not be: its name leads to us.
        found: Any = sys.modules.get(self.module)
        for part in self.__qualname__.split(".") if hasattr(self, "__qualname__") else ():
            found = getattr(found, part, None)
        if found is self:
            return str(self.__qualname__)
        return _rebuild, (self.function, {option: getattr(self, option) for option in _OPTIONS})

    @functools.cached_property
    def parameters(self) -> Parameters:
        """What the type hints say. Lazy, as a hint may name what the module defines further down.

        Raises ConfigError for hints that do not resolve or that JSON cannot express.
        """
        return Parameters(self.function, self.name, self.location)

    @property
    def stream_format(self) -> str | None:
        """ "lines" or "bytes", by the return hint; None for a task that does not stream."""
        return self.parameters.stream_format if self.streams else None

    def bind(self, raw: RawArgs) -> Bound:
        """The arguments to call `function` with, from JSON: an object gives keywords, an array
        positions, null or nothing none, any other value one position. A single parameter that is a
        Struct, dataclass or TypedDict takes the whole object.

        Raises BadArgs with one line that names task, parameter and fault.
        """
        return self.parameters.bind(raw)

    def check_args(self, raw: RawArgs) -> None:
        """Raises BadArgs unless `bind` would succeed."""
        self.parameters.check(raw)

    def call_key(self, raw: RawArgs) -> bytes | None:
        """What calls share that can share a run; None for a task without a `key`, whose arguments are not
        looked at. Raises BadArgs as `bind` does.
        """
        return None if self._call_key is None else self._call_key.of(self.bind(raw))

    def encode_args(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The JSON arguments of the call `task(*args, **kwargs)`, for a caller that holds the task.

        Raises TypeError where Python would, and for a value that JSON cannot express.
        """
        return self.parameters.encode(args, kwargs)

    def decode_result(self, raw: RawArgs) -> Any:
        """The result as the return hint types it; plain JSON where there is no usable hint.

        Raises TaskError if the task returned something else than its hint says.
        """
        data = b"null" if raw is None else raw
        try:
            return self.parameters.result_decoder.decode(data)
        except Exception as error:
            raise TaskError(
                f"task {self.name}: the result is not what its hint says: {printable(error)}",
                type=type(error).__name__,
            ) from error

    def decode_item(self, raw: RawArgs) -> Any:
        """An item of its stream as the return hint types it (`Iterator[int]`); else as `decode_result`."""
        try:
            return self.parameters.item_decoder.decode(b"null" if raw is None else raw)
        except Exception as error:
            raise TaskError(
                f"task {self.name}: an item is not what its hint says: {printable(error)}",
                type=type(error).__name__,
            ) from error

    def schema(self) -> dict[str, Any]:
        """What a caller must know, JSON-encodable: arguments and result as JSON Schema; of a task that
        streams the format (`stream_format`) and, for lines, the JSON Schema of an item.
        """
        doc = (inspect.getdoc(self.function) or "").strip()
        return {
            "name": self.name,
            "doc": doc.partition("\n")[0],
            "module": self.module,
            "args": self.parameters.args_schema(),
            "result": {"type": "null"} if self.streams else self.parameters.result_schema(),
            "stream": self.parameters.stream_schema() if self.streams else None,
            "timeout": self.timeout,
            "soft_timeout": self.soft_timeout,
            "priority": self.priority,
            "concurrency": self.concurrency,
            "key": self.key,
            "isolated": self.isolated,
            "max_memory": self.max_memory,
            "cancel_on_disconnect": self.cancel_on_disconnect,
        }


@overload
def task(function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def task(
    *,
    name: str | None = None,
    timeout: float | None = None,
    soft_timeout: float | None = None,
    priority: int = 0,
    retry: Retry | None = None,
    concurrency: int | None = None,
    key: str | Sequence[str] | None = None,
    isolated: bool = False,
    max_memory: int | None = None,
    cancel_on_disconnect: bool = False,
) -> Callable[[Callable[P, R]], Task[P, R]]: ...


def task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Marks a function as one that callers may run by name: `@task` or `@task(timeout=5)`.

    `name` is the function's own unless given; `timeout` limits each attempt, in seconds from when a
    worker starts it; after `soft_timeout` seconds SoftTimeout is raised in it; of waiting calls those of
    higher `priority` run first; `retry` says when to try again; at most `concurrency` of its calls run at a
    time; calls whose arguments for the parameters named by `key` are equal share one run; each call of an
    `isolated` one has a process of its own; a call that takes more than `max_memory` bytes has a MemoryError;
    one with `cancel_on_disconnect` is cancelled when the connection goes away that its caller waits at.

    A generator function, plain or asynchronous, streams what it yields to its caller: bytes as they
    are, anything else as a line of JSON. Raises ValueError for a bad value, TypeError for what cannot be a
    task.
    """
    if function is None:
        return functools.partial(_decorate, options)
    return _decorate(options, function)


def _decorate(options: dict[str, Any], function: Callable[..., Any]) -> Task[..., Any]:
    return Task(function, **options)


def encode_result(value: Any, limit: int) -> bytes:
    """A task's result as JSON of at most `limit` bytes.

    Raises TypeError, saying where, for what JSON cannot express; TooLarge beyond the limit.
    """
    data = encode(value, "result")
    if len(data) > limit:
        raise TooLarge(f"the result has {len(data)} bytes, more than the limit of {limit}")
    return data


class Registry(Mapping[str, Task[..., Any]]):
    """The tasks that are served, by name, in the order of their names.

    `modules` are the import names that they came from and `paths` the folders that must be on
    `sys.path`, the first foremost, for another process to import the same. `end_with_callers` are the
    names of those with `cancel_on_disconnect`.
    Raises ConfigError for two tasks of one name and for hints that cannot be served.
    """

    def __init__(
        self, tasks: Iterable[Task[..., Any]] = (), modules: Iterable[str] = (), paths: Iterable[str] = ()
    ) -> None:
        self.modules = tuple(modules)
        self.paths = tuple(paths)
        found: dict[str, Task[..., Any]] = {}
        for item in tasks:
            other = found.setdefault(item.name, item)
            if other is not item:
                raise ConfigError(f"two tasks are named {item.name}: {other.location} and {item.location}")
            _ = item.parameters
        self._tasks = dict(sorted(found.items()))
        self.end_with_callers = frozenset(name for name, item in found.items() if item.cancel_on_disconnect)

    @classmethod
    def from_modules(cls, names: Iterable[str], paths: Iterable[str] = ()) -> Registry:
        """Imports `names`, import paths (`app.tasks`) or files (`tasks.py`), and collects their tasks.

        The current folder and that of each file go first on `sys.path`; before them `paths`, if
        given, as another process's registry tells them. Raises ConfigError in one line.
        """
        importer = Importer(paths, (__file__, options.__file__, callkey.__file__))
        modules = [importer.load(name) for name in ([names] if isinstance(names, str) else names)]
        if not modules:
            raise ConfigError("no module was given to take tasks from")
        tasks = {id(item): item for module in modules for item in _tasks_of(module)}
        return cls(tasks.values(), dict.fromkeys(module.__name__ for module in modules), importer.paths)

    def schemas(self) -> list[dict[str, Any]]:
        """`Task.schema()` of each task, in the order of names."""
        return [item.schema() for item in self._tasks.values()]

    def __getitem__(self, name: str) -> Task[..., Any]:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<Registry {len(self)} tasks: {', '.join(self)}>"


def _tasks_of(module: ModuleType) -> list[Task[..., Any]]:
    tasks = [value for value in vars(module).values() if isinstance(value, Task)]
    if not tasks:
        raise ConfigError(f"module {module.__name__} has no tasks; decorate its functions with @task")
    return tasks


def _check_function(function: Any) -> None:
    if isinstance(function, Task):
        raise TypeError(f"{function!r} is a task already")
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"@task takes a function, not {function!r}")


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a task must be text that is not empty, not {name!r}")
    if not name.isprintable() or "/" in name:
        raise ValueError(f"the name of a task must be printable and without '/': {name!r}")
    if name == "<lambda>":
        raise ValueError("a lambda needs a name: task(name=...)(lambda ...)")
    if name.startswith(RESERVED):
        raise ValueError(f"names that begin with {RESERVED!r} are reserved: {name!r}")
    return name


def _rebuild(function: Callable[..., Any], options: dict[str, Any]) -> Task[..., Any]:
    return Task(function, **options)
