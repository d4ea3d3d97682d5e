"""The `acomm` command. It reads words and prints; what it does is done elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from functools import wraps
from importlib.metadata import version
from typing import Any, TypeVar

import click
import msgspec

from acomm.calls import Call
from acomm.client import Client, connect
from acomm.errors import AcommError, AddressInUse, BadRequest, ConfigError, HandlerError
from acomm.itemstream import Stream
from workers import calling, replaying
from workers.config import Config
from workers.errors import printable

F = TypeVar("F", bound=Callable[..., Any])

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script's entry. Exit status: 0 done, 1 the call failed, 2 it could not be tried."""
    cli.main(args=None if arguments is None else list(arguments), prog_name="acomm")


def _reporting(function: F) -> F:
    """Errors of ours as one line on stderr, and the right exit status."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ConfigError, AddressInUse, HandlerError) as error:
            _fail(error, EXIT_USAGE)
        except AcommError as error:
            _fail(error, EXIT_FAILED)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapped  # type: ignore[return-value]


def _fail(error: AcommError, status: int) -> None:
    text = printable(str(error), 2000)
    code = f" [{error.code}]" if error.code not in ("error", "config", "address_in_use") else ""
    click.echo(f"acomm: {text}{code}", err=True)
    for line in calling.shown(error.receipt or {}):
        click.echo(line, err=True)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("acomm"), prog_name="acomm")
def cli() -> None:
    """Run Python tasks in supervised worker processes; call them from any language by a unix socket."""


def _reaching(function: F) -> F:
    """The options that say which supervisor is meant."""
    url = click.option(
        "--url",
        metavar="URL",
        help="unix://PATH, or an http:// URL on this host.  [default: $ACOMM_URL, else the default socket]",
    )
    token = click.option(
        "--token-file", metavar="FILE", help="Holds the token for HTTP.  [default: $ACOMM_TOKEN]"
    )
    return url(token(function))


def _connect(url: str | None, token_file: str | None, wait: float = 0.0) -> Client:
    """Raises ConfigError for what can never lead to a supervisor."""
    try:
        return connect(url, token_file=token_file, wait=wait)
    except BadRequest as error:
        raise ConfigError(str(error)) from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@cli.command()
@click.argument("modules", nargs=-1, metavar="MODULE...")
@click.option(
    "-w",
    "--workers",
    metavar="N|MIN:MAX",
    help="Worker processes; MIN:MAX: as many as there is work for.  [default: the CPUs that may be used]",
)
@click.option(
    "--coroutines",
    type=int,
    metavar="N",
    help="Calls of coroutine tasks that a worker runs at a time.  [default: 100]",
)
@click.option(
    "--max-tasks-per-child", type=int, metavar="N", help="Replace a worker process after so many calls."
)
@click.option(
    "--max-worker-growth",
    type=int,
    metavar="BYTES",
    help="Replace a worker process whose memory has grown by so much.",
)
@click.option(
    "--socket", metavar="PATH", help="Where to listen.  [default: $ACOMM_SOCKET, else a private folder]"
)
@click.option(
    "--allow-uid", type=int, multiple=True, metavar="UID", help="Who may connect, besides you and root."
)
@click.option("--allow-group", type=int, multiple=True, metavar="GID", help="Groups that may connect.")
@click.option(
    "--allow-hook",
    multiple=True,
    metavar="HOST[:PORT]|CIDR[:PORT]|unix:PATH",
    help="Where hooks and streams of requests may lead, besides the public internet.",
)
@click.option("--max-frame", type=int, metavar="BYTES", help="The largest message.  [default: 64 MiB]")
@click.option(
    "--max-queued",
    type=int,
    metavar="N",
    help="Requests under way; more are refused as busy.  [default: 100,000]",
)
@click.option(
    "--max-queued-bytes", type=int, metavar="BYTES", help="Their arguments together.  [default: 512 MiB]"
)
@click.option(
    "--max-connections",
    type=int,
    metavar="N",
    help="Open connections to the unix sockets.  [default: 10,000]",
)
@click.option(
    "--max-unread-bytes",
    type=int,
    metavar="BYTES",
    help="Large messages on their way in, together.  [default: 4 times --max-frame]",
)
@click.option(
    "--max-share",
    type=float,
    metavar="PART",
    help="Of all these, the most for one user where several may connect.  [default: 0.5]",
)
@click.option(
    "--journal", metavar="PATH", help="Keep accepted requests in this file until they are answered."
)
@click.option(
    "--durability",
    type=click.Choice(["power", "process"]),
    help="What an acknowledgement outlives: the loss of power, or of the process alone.  [default: power]",
)
@click.option(
    "--drain-timeout", type=float, metavar="SECONDS", help="Time to finish at SIGTERM.  [default: 10]"
)
@click.option(
    "--term-grace",
    type=float,
    metavar="SECONDS",
    help="Time to clean up for a task that is cancelled or too slow.  [default: 0.2]",
)
@click.option(
    "--capture/--no-capture",
    default=None,
    help="Tell in the error of a lost call what it printed last.  [default: capture]",
)
@click.option(
    "--forward-timeout",
    type=float,
    metavar="SECONDS",
    help="For requests passed on to other services that bring no timeout.  [default: 600]",
)
@click.option("--http", metavar="HOST:PORT", help="Take requests over HTTP, too. Port 0: any that is free.")
@click.option(
    "--http-token-file",
    metavar="PATH",
    help="The secret that callers over HTTP show; made if missing.  [default: the socket's path and .token]",
)
@click.option(
    "--http-no-token",
    is_flag=True,
    default=None,
    help="Let in whoever can connect; on loopback addresses only.",
)
@click.option(
    "--http-host", multiple=True, metavar="NAME[:PORT]", help="A further name that callers know us by."
)
@click.option("--http-url", metavar="URL", help="How others reach us over HTTP, if not at that port.")
@click.option(
    "--stream-expiry",
    type=float,
    metavar="SECONDS",
    help="Time for the reader of a task's stream to come.  [default: 60]",
)
@click.option(
    "--provider-dir",
    metavar="DIR",
    help="Serve tasks to a Go coordinator, too: its socket folder; DIR/TASK/PRIORITY-NAME.sock is made.",
)
@click.option("--provider-name", metavar="NAME", help="This provider's name in that folder.")
@click.option(
    "--provider-priority", type=int, metavar="N", help="Lower goes first, in text order.  [default: 50]"
)
@click.option(
    "--config", "file", metavar="FILE", help="Settings in TOML; options and ACOMM_* come before them."
)
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--until-eof", is_flag=True, help="Stop also when standard input ends.")
@click.option(
    "--takeover", is_flag=True, help="Take the place of the supervisor at the socket, if there is one."
)
@click.option("--settings", hidden=True, help="All settings as JSON, and no others: for programs.")
@_reporting
def serve(
    modules: tuple[str, ...],
    allow_uid: tuple[int, ...],
    allow_group: tuple[int, ...],
    allow_hook: tuple[str, ...],
    http_host: tuple[str, ...],
    file: str | None,
    log_level: str,
    until_eof: bool,
    takeover: bool,
    settings: str | None,
    **given: Any,
) -> None:
    """Serve the tasks of MODULE (an import path, or a .py file) until SIGTERM."""
    from workers.supervisor import Supervisor

    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    lists = {
        "modules": modules or None,
        "allow_uid": allow_uid or None,
        "allow_gid": allow_group or None,
        "allow_hook": allow_hook or None,
        "http_host": http_host or None,
    }
    if settings is None:
        config = Config.load({**given, **lists}, file=file)
    else:
        config = Config.from_json(settings)
    supervisor = Supervisor(config=config)
    supervisor.takes_over = takeover
    supervisor.run(_announce, until_eof=until_eof)


def _announce(supervisor: Any) -> None:
    pool, tasks = supervisor.pool, len(supervisor.registry)
    workers = _count(pool.size, "worker")
    if pool.least < pool.size:
        workers = f"{pool.least} to {workers}"
    with suppress(OSError):  # nobody may be there to read it
        where = supervisor.url if supervisor.door is None else f"{supervisor.url} and {supervisor.door.url}"
        click.echo(f"acomm: ready on {where} with {workers} and {_count(tasks, 'task')}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@cli.command()
@click.argument("task")
@click.argument("arguments", nargs=-1, metavar="[JSON... | KEY=VALUE...]")
@_reaching
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up after that long, queueing included.")
@click.option("--wait", type=float, default=0.0, metavar="SECONDS", help="Wait for one that is away.")
@click.option("--input", "source", metavar="FILE", help="Send FILE as the request's stream; - is stdin.")
@click.option("--stream", "must_stream", is_flag=True, help="The answer must be a stream.")
@click.option("--progress", "show_progress", is_flag=True, help="Show on stderr how far the task is.")
@_reporting
def call(
    task: str,
    arguments: tuple[str, ...],
    url: str | None,
    token_file: str | None,
    timeout: float | None,
    wait: float,
    source: str | None,
    must_stream: bool,
    show_progress: bool,
) -> None:
    """Call TASK and print its result as JSON, or its stream as it comes.

    One JSON object gives keyword arguments, one array positional ones; any other JSON values are
    positional arguments. VALUE is read as JSON where that fits the task's type hint, else as text.
    """
    if timeout is not None and not 0 < timeout < float("inf"):
        raise click.UsageError("--timeout must be a positive number of seconds")
    if not 0 <= wait < float("inf"):
        raise click.UsageError("--wait must be a number of seconds, 0 or more")
    try:
        given = calling.Arguments(arguments)
        stream = None if source is None else calling.open_source(source)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with _connect(url, token_file, wait) as client:
        args, kwargs = given.for_task(client, task)
        submitted = client.using(timeout=timeout, stream=stream).submit(task, *args, **kwargs)
        with ExitStack() as shown:
            if show_progress:
                shown.enter_context(calling.Display(submitted))
            result = _wait(submitted)
            if isinstance(result, Stream):
                if sys.stdout.isatty():
                    shown.close()  # it would be in the way of what is printed
                calling.copy(result, sys.stdout.buffer)
                return
        if must_stream:
            raise AcommError(f"the answer of {printable(task)} is no stream")
        _echo_json(result)


def _wait(call: Call) -> Any:
    try:
        return call.result()
    except KeyboardInterrupt:
        call.cancel()  # whoever interrupts a call wants the task to stop, not to run on unheard
        raise


@cli.command()
@_reaching
@json_option
@_reporting
def tasks(url: str | None, token_file: str | None, as_json: bool) -> None:
    """List the tasks that are served."""
    with _connect(url, token_file) as client:
        found = client.tasks()
    if as_json:
        _echo_json(found)
        return
    rows = [(task["name"], _signature(task), task.get("doc") or "") for task in found]
    _echo_table(("task", "arguments", "what it does"), rows)


def _signature(task: dict[str, Any]) -> str:
    schema = task["args"]
    required = set(schema.get("required", ()))
    parts = []
    for name, value in schema.get("properties", {}).items():
        types = "|".join(sorted(calling.json_types(value) or {"any"}))
        parts.append(f"{name}: {types}" if name in required else f"[{name}: {types}]")
    return ", ".join(parts)


@cli.command()
@_reaching
@json_option
@_reporting
def stats(url: str | None, token_file: str | None, as_json: bool) -> None:
    """Show the supervisor's figures."""
    with _connect(url, token_file) as client:
        found = client.stats()
    if as_json:
        _echo_json(found)
        return
    workers = found.pop("workers")
    # A supervisor of another version may not tell of them.
    troubled = found.get("hooks", {}).pop("troubled", [])
    _echo_table(("figure", "value"), [(name, _plain(value)) for name, value in found.items()])
    rows = [[_plain(value) for value in worker.values()] for worker in workers]
    _echo_table(tuple(workers[0]) if workers else ("workers",), rows)
    if troubled:
        rows = [[_plain(value) for value in hook.values()] for hook in troubled]
        _echo_table(("hook in trouble", *list(troubled[0])[1:]), rows)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


@cli.command()
@click.argument("id")
@_reaching
@_reporting
def cancel(id: str, url: str | None, token_file: str | None) -> None:
    """Stop the request with that ID, even while it runs."""
    with _connect(url, token_file) as client:
        if not client.cancel(id):
            raise AcommError(f"no request {printable(id)} is under way")


@cli.command()
@click.argument("id", required=False)
@click.option("--task", metavar="NAME", help="Those of that task alone.")
@click.option("--limit", type=int, default=100, show_default=True, metavar="N", help="The latest N.")
@_reaching
@json_option
@_reporting
def failed(
    id: str | None, task: str | None, limit: int, url: str | None, token_file: str | None, as_json: bool
) -> None:
    """List requests that have failed, or whose answer nobody took; with ID all that is known of one.

    The supervisor keeps them in its --journal.
    """
    with _connect(url, token_file) as client:
        found = client.call("acomm.failed", **({"task": task, "limit": limit} if id is None else {"id": id}))
    if as_json:
        _echo_json(found)
    elif id is None:
        rows = [
            (row["id"], row["task"], row["code"], _when(row["ended"]), row["error"] or "") for row in found
        ]
        _echo_table(("id", "task", "error", "at", "text"), rows)
    else:
        for line in replaying.told(found):
            click.echo(line)


def _when(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


@cli.command()
@click.argument("id")
@click.argument("modules", nargs=-1, metavar="[MODULE...]")
@click.option("--inline", is_flag=True, help="Run it here, without a worker; MODULE has its task.")
@click.option("--pdb", is_flag=True, help="With --inline: open the debugger where it raises.")
@_reaching
@_reporting
def replay(
    id: str, modules: tuple[str, ...], inline: bool, pdb: bool, url: str | None, token_file: str | None
) -> None:
    """Run the failed request ID again, or deliver its answer again if that nobody took.

    The answer goes where the request said. With --inline it runs in this process instead, to look for the
    fault; its result is printed and nobody else is told.
    """
    if inline != bool(modules) or (pdb and not inline):
        raise click.UsageError("--inline and the MODULE of the task go together, and --pdb with them")
    with _connect(url, token_file) as client:
        if not inline:
            client.call("acomm.replay", id=id)
            click.echo(f"{printable(id)} is under way again")
            return
        found = client.call("acomm.failed", id=id)
    _echo_json(replaying.run(found, modules, debug=pdb))


@cli.command()
@click.argument("ids", nargs=-1, metavar="[ID...]")
@click.option("--task", metavar="NAME", help="All of that task.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@_reaching
@_reporting
def purge(
    ids: tuple[str, ...], task: str | None, everything: bool, url: str | None, token_file: str | None
) -> None:
    """Forget failed requests. Their ids stay known as long as those of others."""
    if (len(ids) > 0) + (task is not None) + everything != 1:
        raise click.UsageError("name IDs, a --task, or --all: one of them")
    which = {"ids": list(ids)} if ids else {"task": task} if task is not None else {"all": True}
    with _connect(url, token_file) as client:
        count = client.call("acomm.purge", **which)
    click.echo(f"{_count(count, 'request')} forgotten")


@cli.command()
@_reaching
@_reporting
def reload(url: str | None, token_file: str | None) -> None:
    """Serve new code without losing a call: load the task modules again and replace the workers."""
    with _connect(url, token_file) as client:
        found = client.call("acomm.reload")
    click.echo(f"acomm: reloaded {_count(len(found['tasks']), 'task')}")


@cli.command()
@_reaching
@click.option("--timeout", type=float, metavar="SECONDS", help="Wait no longer for what is not done.")
@_reporting
def drain(url: str | None, token_file: str | None, timeout: float | None) -> None:
    """Have the supervisor take no more, finish all that it has accepted, and exit; wait until it is gone."""
    if timeout is not None and not 0 <= timeout < float("inf"):
        raise click.UsageError("--timeout must be a number of seconds, 0 or more")
    with _connect(url, token_file) as client:
        calling.drain(client, timeout, lambda line: click.echo(line, err=True))


@cli.command()
@click.option("-w", "--workers", type=int, help="Worker processes.  [default: the CPUs that may be used]")
@click.option("--quick", is_flag=True, help="Leave out the standard library's tests: a third of the work.")
@_reporting
def demo(workers: int | None, quick: bool) -> None:
    """Analyse the standard library's source in worker processes, and kill one half-way."""
    from workers.demo import run

    sys.exit(run(workers=workers, quick=quick))


def _echo_json(value: Any) -> None:
    calling.write(msgspec.json.encode(value) + b"\n", sys.stdout.buffer)


def _echo_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table for people; on anything but a terminal, tab-separated lines for programs."""
    if not sys.stdout.isatty():
        lines = ("\t".join(printable(cell, 10_000) for cell in row) + "\n" for row in rows)
        calling.write("".join(lines).encode(), sys.stdout.buffer)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=box.SIMPLE)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
