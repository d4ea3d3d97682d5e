"""One frozen Config; the command line, the environment and a TOML file all derive from its fields."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from acomm.framing import DEFAULT_MAX_FRAME, LARGEST_MAX_FRAME
from acomm.socketpath import default_socket
from acomm.streamsocket import EXPIRY
from workers.ending import Graces
from workers.errors import ConfigError, printable

PREFIX = "ACOMM_"

MAX_CONNECTIONS = 10_000
"""Open connections to the unix sockets, unless another number is asked for."""

HTTP_CONNECTIONS = 1024
"""Connections that the HTTP door takes at a time."""

UNREAD_FRAMES = 4
"""Of the largest messages, how many may be on their way in at a time by default."""

Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Uid = Annotated[int, msgspec.Meta(ge=0)]


def available_cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a supervisor.

    `workers` processes (default: the processors that we may use) at most and `min_workers` (None: as many) at
    least, each running up to `coroutines` calls of coroutine tasks at a time, and replaced after
    `max_tasks_per_child` calls (None: never) and when its memory has grown by `max_worker_growth` bytes;
    `socket` is a path; `allow_uid` and `allow_gid` may connect besides us and root; `allow_hook` are rules
    for where hooks and streams may lead besides (see `acomm.egress.Policy`); `max_frame` in bytes;
    `drain_timeout` in seconds, and so is `forward_timeout`, for requests to other services that bring no
    timeout of their own. `term_grace` is for how many seconds a task may clean up whose time is over, or that
    is cancelled. With `capture`, receipts tell the last that a lost call printed, and its stdout and stderr
    are pipes. `stream_expiry` is for how many seconds a task's stream waits for its reader.
    With `provider_dir`, tasks are also served to a Go coordinator whose socket folder that is, by sockets
    named after `provider_priority` and `provider_name`.

    At most `max_queued` requests are under way, with `max_queued_bytes` bytes of arguments, and at most
    `max_connections` connections to the unix sockets are open. `max_unread_bytes` are the bytes of large
    messages that have not come whole (None: four of the largest). Where others than our own user may send
    requests, none of them has more than `max_share` of any of these.
    `journal` is the path of a file where requests are stored before they are acknowledged (None: nowhere),
    with `durability` against the loss of "power" or that of the "process" alone.

    `http` is where the HTTP door listens, HOST:PORT (None: there is none); `http_url` how others reach it;
    `http_token_file` is a path (None: the socket's, with `.token`), and `http_no_token` lets in everybody who
    can connect; `http_host` are further names that it answers to.
    """

    modules: tuple[str, ...] = ()
    workers: Count = msgspec.field(default_factory=available_cpus)
    min_workers: Count | None = None
    max_tasks_per_child: Count | None = None
    max_worker_growth: Count | None = None
    coroutines: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    socket: Annotated[str, msgspec.Meta(min_length=1)] = msgspec.field(default_factory=default_socket)
    allow_uid: tuple[Uid, ...] = ()
    allow_gid: tuple[Uid, ...] = ()
    allow_hook: tuple[str, ...] = ()
    max_frame: Annotated[int, msgspec.Meta(ge=1024, le=LARGEST_MAX_FRAME)] = DEFAULT_MAX_FRAME
    max_queued: Count = 100_000
    max_queued_bytes: Bytes = 512 * 1024 * 1024
    max_connections: Count = MAX_CONNECTIONS
    max_unread_bytes: Bytes | None = None
    max_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    journal: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    durability: Literal["power", "process"] = "power"
    drain_timeout: Seconds = 10.0
    term_grace: Seconds = Graces().term
    capture: bool = True
    forward_timeout: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 600.0
    stream_expiry: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = EXPIRY
    provider_dir: str | None = None
    provider_name: str | None = None
    provider_priority: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 50
    http: str | None = None
    http_url: str | None = None
    http_token_file: str | None = None
    http_no_token: bool = False
    http_host: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        given: Mapping[str, Any],
        *,
        file: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Config:
        """Settings from `given` (those that are not None), then `ACOMM_<FIELD>`, then the TOML `file`.

        Raises ConfigError, which names the setting and where it came from.
        """
        values: dict[str, Any] = {}
        if file is not None:
            values.update(_spread(_from_file(Path(file)), str(file)))
        for name in cls.__struct_fields__:
            text = environ.get(PREFIX + name.upper())
            if text:
                values.update(_spread({name: text}, PREFIX + name.upper()))
                if isinstance(values[name], str):
                    values[name] = _from_text(cls, name, text)
        own = {name: value for name, value in given.items() if value is not None}
        for name, value in _spread(own, "settings").items():
            values[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        config = _convert(cls, values, "settings")
        if config.min_workers is not None and config.min_workers > config.workers:
            raise ConfigError(f"min_workers is {config.min_workers}, and workers only {config.workers}")
        if config.unread_bytes < config.max_frame:
            raise ConfigError(
                f"max_unread_bytes is {config.unread_bytes}, less than max_frame: {config.max_frame}"
            )
        return config

    @classmethod
    def from_json(cls, text: str) -> Config:
        """All settings as `msgspec.json.encode` writes a Config. Raises ConfigError."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"settings: {error}") from None

    @property
    def unread_bytes(self) -> int:
        """How many bytes of large messages may be on their way in at a time."""
        return UNREAD_FRAMES * self.max_frame if self.max_unread_bytes is None else self.max_unread_bytes

    @property
    def share(self) -> float:
        """The most that one caller may have of what is limited: everything, where there is only one. Over
        HTTP those with the token are one, and those without are another.
        """
        return 1.0 if self.socket_mode == 0o600 and self.http is None else self.max_share

    @property
    def socket_mode(self) -> int:
        """0600, or wider where others are allowed, whom the kernel then tells apart for us. A file has one
        group, so it cannot tell several.
        """
        if self.allow_uid or len(self.allow_gid) > 1:
            return 0o666
        return 0o660 if self.allow_gid else 0o600


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    # Other programs may share the file, so a table of our own is looked for first.
    table = values.get("acomm", values)
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: acomm must be a table")
    _convert(Config, _spread(table, str(path)), str(path))
    return dict(table)


def _spread(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of one source, in which workers may be "MIN:MAX". A plain number says that they are not to
    be more or fewer, whatever a source behind has for the minimum.
    """
    found = dict(values)
    workers = found.get("workers")
    if isinstance(workers, str):
        least, colon, most = workers.rpartition(":")
        if not most.isdecimal() or bool(colon) != least.isdecimal():
            raise ConfigError(f"{where}: workers must be a number or MIN:MAX, not {printable(workers)!r}")
        found["workers"] = int(most)
        if not int(most) or (colon and not int(least)):
            raise ConfigError(f"{where}: workers must be 1 or more, not {printable(workers)!r}")
        if colon:
            found["min_workers"] = int(least)
    if workers is not None:
        found.setdefault("min_workers", None)
    return found


def _from_text(cls: type[Config], name: str, text: str) -> Any:
    """A setting from the environment; lists are separated by commas."""
    field = next(field for field in msgspec.structs.fields(cls) if field.name == name)
    listed = isinstance(msgspec.inspect.type_info(field.type), msgspec.inspect.VarTupleType)
    value: Any = [part.strip() for part in text.split(",") if part.strip()] if listed else text
    try:
        return msgspec.convert(value, field.type, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{PREFIX}{name.upper()}: {error}") from None


def _convert(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    try:
        return msgspec.convert(dict(values), cls)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
