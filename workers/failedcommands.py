"""`acomm failed`, `replay` and `purge`: requests that have failed, as the journal keeps them."""

from __future__ import annotations

from datetime import datetime

import click

from workers import replaying
from workers.commands import connected, count, echo_json, echo_table, json_option, reaching, reporting
from workers.errors import printable


@click.command()
@click.argument("id", required=False)
@click.option("--task", metavar="NAME", help="Those of that task alone.")
@click.option("--limit", type=int, default=100, show_default=True, metavar="N", help="The latest N.")
@reaching
@json_option
@reporting
def failed(
    id: str | None, task: str | None, limit: int, url: str | None, token_file: str | None, as_json: bool
) -> None:
    """List requests that have failed, or whose answer nobody took; with ID all that is known of one.

    The supervisor keeps them in its --journal.
    """
    with connected(url, token_file) as client:
        found = client.call("acomm.failed", **({"task": task, "limit": limit} if id is None else {"id": id}))
    if as_json:
        echo_json(found)
    elif id is None:
        rows = [
            (row["id"], row["task"], row["code"], _when(row["ended"]), row["error"] or "") for row in found
        ]
        echo_table(("id", "task", "error", "at", "text"), rows)
    else:
        for line in replaying.told(found):
            click.echo(line)


def _when(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


@click.command()
@click.argument("id")
@click.argument("modules", nargs=-1, metavar="[MODULE...]")
@click.option("--inline", is_flag=True, help="Run it here, without a worker; MODULE has its task.")
@click.option("--pdb", is_flag=True, help="With --inline: open the debugger where it raises.")
@reaching
@reporting
def replay(
    id: str, modules: tuple[str, ...], inline: bool, pdb: bool, url: str | None, token_file: str | None
) -> None:
    """Run the failed request ID again, or deliver its answer again if that nobody took.

    The answer goes where the request said. With --inline it runs in this process instead, to look for the
    fault; its result is printed and nobody else is told.
    """
    if inline != bool(modules) or (pdb and not inline):
        raise click.UsageError("--inline and the MODULE of the task go together, and --pdb with them")
    with connected(url, token_file) as client:
        if not inline:
            client.call("acomm.replay", id=id)
            click.echo(f"{printable(id)} is under way again")
            return
        found = client.call("acomm.failed", id=id)
    echo_json(replaying.run(found, modules, debug=pdb))


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID...]")
@click.option("--task", metavar="NAME", help="All of that task.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@reaching
@reporting
def purge(
    ids: tuple[str, ...], task: str | None, everything: bool, url: str | None, token_file: str | None
) -> None:
    """Forget failed requests. Their ids stay known as long as those of others."""
    if (len(ids) > 0) + (task is not None) + everything != 1:
        raise click.UsageError("name IDs, a --task, or --all: one of them")
    which = {"ids": list(ids)} if ids else {"task": task} if task is not None else {"all": True}
    with connected(url, token_file) as client:
        forgotten = client.call("acomm.purge", **which)
    click.echo(f"{count(forgotten, 'request')} forgotten")
