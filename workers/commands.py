"""What the verbs of the `acomm` command have in common: how they reach a supervisor, print, and fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, TypeVar

import click
import msgspec

from acomm.client import Client, connect
from acomm.errors import AcommError, AddressInUse, BadRequest, ConfigError, HandlerError
from workers import calling
from workers.errors import printable

F = TypeVar("F", bound=Callable[..., Any])

EXIT_FAILED = 1
EXIT_USAGE = 2

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def reporting(function: F) -> F:
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


def reaching(function: F) -> F:
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


def connected(url: str | None, token_file: str | None, wait: float = 0.0) -> Client:
    """A client of the supervisor that the options of `reaching` mean. Raises ConfigError for what can never
    lead to one.
    """
    try:
        return connect(url, token_file=token_file, wait=wait)
    except BadRequest as error:
        raise ConfigError(str(error)) from None


def count(number: int, what: str) -> str:
    """As in "1 task" and "2 tasks"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def echo_json(value: Any) -> None:
    """As one line."""
    calling.write(msgspec.json.encode(value) + b"\n", sys.stdout.buffer)


def echo_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
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
