"""The `acomm` command. It reads words and prints; what it does is done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import click

from acomm.calls import Call
from acomm.errors import AcommError
from acomm.itemstream import Stream
from workers import calling
from workers.commands import connected, count, echo_json, echo_table, json_option, reaching, reporting
from workers.errors import printable
from workers.failedcommands import failed, purge, replay
from workers.servecommand import serve


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script's entry. Exit status: 0 done, 1 the call failed, 2 it could not be tried."""
    cli.main(args=None if arguments is None else list(arguments), prog_name="acomm")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("acomm"), prog_name="acomm")
def cli() -> None:
    """Run Python tasks in supervised worker processes; call them from any language by a unix socket."""


for command in (serve, failed, replay, purge):
    cli.add_command(command)


@cli.command()
@click.argument("task")
@click.argument("arguments", nargs=-1, metavar="[JSON... | KEY=VALUE...]")
@reaching
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up after that long, queueing included.")
@click.option("--wait", type=float, default=0.0, metavar="SECONDS", help="Wait for one that is away.")
@click.option("--input", "source", metavar="FILE", help="Send FILE as the request's stream; - is stdin.")
@click.option("--stream", "must_stream", is_flag=True, help="The answer must be a stream.")
@click.option("--progress", "show_progress", is_flag=True, help="Show on stderr how far the task is.")
@reporting
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
    with connected(url, token_file, wait) as client:
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
        echo_json(result)


def _wait(call: Call) -> Any:
    try:
        return call.result()
    except KeyboardInterrupt:
        call.cancel()  # whoever interrupts a call wants the task to stop, not to run on unheard
        raise


@cli.command()
@reaching
@json_option
@reporting
def tasks(url: str | None, token_file: str | None, as_json: bool) -> None:
    """List the tasks that are served."""
    with connected(url, token_file) as client:
        found = client.tasks()
    if as_json:
        echo_json(found)
        return
    rows = [(task["name"], _signature(task), task.get("doc") or "") for task in found]
    echo_table(("task", "arguments", "what it does"), rows)


def _signature(task: dict[str, Any]) -> str:
    schema = task["args"]
    required = set(schema.get("required", ()))
    parts = []
    for name, value in schema.get("properties", {}).items():
        types = "|".join(sorted(calling.json_types(value) or {"any"}))
        parts.append(f"{name}: {types}" if name in required else f"[{name}: {types}]")
    return ", ".join(parts)


@cli.command()
@reaching
@json_option
@reporting
def stats(url: str | None, token_file: str | None, as_json: bool) -> None:
    """Show the supervisor's figures."""
    with connected(url, token_file) as client:
        found = client.stats()
    if as_json:
        echo_json(found)
        return
    workers = found.pop("workers")
    # A supervisor of another version may not tell of them.
    troubled = found.get("hooks", {}).pop("troubled", [])
    echo_table(("figure", "value"), [(name, _plain(value)) for name, value in found.items()])
    rows = [[_plain(value) for value in worker.values()] for worker in workers]
    echo_table(tuple(workers[0]) if workers else ("workers",), rows)
    if troubled:
        rows = [[_plain(value) for value in hook.values()] for hook in troubled]
        echo_table(("hook in trouble", *list(troubled[0])[1:]), rows)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


@cli.command()
@click.argument("id")
@reaching
@reporting
def cancel(id: str, url: str | None, token_file: str | None) -> None:
    """Stop the request with that ID, even while it runs."""
    with connected(url, token_file) as client:
        if not client.cancel(id):
            raise AcommError(f"no request {printable(id)} is under way")


@cli.command()
@reaching
@reporting
def reload(url: str | None, token_file: str | None) -> None:
    """Serve new code without losing a call: load the task modules again and replace the workers."""
    with connected(url, token_file) as client:
        found = client.call("acomm.reload")
    click.echo(f"acomm: reloaded {count(len(found['tasks']), 'task')}")


@cli.command()
@reaching
@click.option("--timeout", type=float, metavar="SECONDS", help="Wait no longer for what is not done.")
@reporting
def drain(url: str | None, token_file: str | None, timeout: float | None) -> None:
    """Have the supervisor take no more, finish all that it has accepted, and exit; wait until it is gone."""
    if timeout is not None and not 0 <= timeout < float("inf"):
        raise click.UsageError("--timeout must be a number of seconds, 0 or more")
    with connected(url, token_file) as client:
        calling.drain(client, timeout, lambda line: click.echo(line, err=True))


@cli.command()
@click.option("-w", "--workers", type=int, help="Worker processes.  [default: the CPUs that may be used]")
@click.option("--quick", is_flag=True, help="Leave out the standard library's tests: a third of the work.")
@reporting
def demo(workers: int | None, quick: bool) -> None:
    """Analyse the standard library's source in worker processes, and kill one half-way."""
    from workers.demo import run

    sys.exit(run(workers=workers, quick=quick))
