"""`acomm serve`: its options, which are the settings of `workers.config`, and its first line of output."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any

import click

from workers.commands import count, reporting
from workers.config import Config


@click.command()
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
@reporting
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
    workers = count(pool.size, "worker")
    if pool.least < pool.size:
        workers = f"{pool.least} to {workers}"
    with suppress(OSError):  # nobody may be there to read it
        where = supervisor.url if supervisor.door is None else f"{supervisor.url} and {supervisor.door.url}"
        click.echo(f"acomm: ready on {where} with {workers} and {count(tasks, 'task')}")
