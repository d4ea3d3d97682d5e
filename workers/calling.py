"""What `acomm call` does: reads arguments from words, shows progress, copies a stream to its output, and says
why a call was lost.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, Self

import msgspec

from acomm.calls import Call, Progress
from acomm.client import Client
from acomm.errors import AcommError, ConnectionLost
from acomm.itemstream import Stream
from workers.errors import printable

if TYPE_CHECKING:
    from rich.progress import TaskID

EXIT_BROKEN_PIPE = 128 + 13
"""What a shell says of a program that SIGPIPE has ended."""

_ASK = 5.0
"""Seconds for the service to tell its tasks' types. It may be one that has never heard of the question."""

_LOOK = 0.2  # seconds between looks at the progress; the client asks as often

SHOWN_LINES = 10
"""Lines that are shown of each text in a receipt."""

_LINE = 400  # characters

# Frames below a task's.
_OURS = re.compile(
    r"/workers/(worker|workerloop|pickledworker|mapped|coroutines|forked|template|softlimit|memorylimit)\.py"
    r'", line \d+ in |File "<string>"'
)


class Arguments:
    """Arguments from the command line: JSON values, or KEY=VALUE pairs. Raises ValueError in one line."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._values: list[Any] = []
        self._named: dict[str, str] = {}
        for text in texts:
            try:
                self._values.append(_json(text))
            except ValueError:
                self._name(text)
        if self._named and self._values:
            raise ValueError("give JSON values or KEY=VALUE pairs, not both")

    def _name(self, text: str) -> None:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{printable(text)} is neither JSON nor KEY=VALUE")
        if key in self._named:
            raise ValueError(f"{printable(key)} is given twice")
        self._named[key] = value

    def for_task(self, client: Client, task: str) -> tuple[Sequence[Any], dict[str, Any]]:
        """Positional and keyword arguments. What a pair's value means is for the task's types to say, where
        its service tells them and it makes a difference.
        """
        if self._named:
            schemas = _schemas(client, task) if any(map(_is_json, self._named.values())) else {}
            return (), {key: read_value(text, schemas.get(key)) for key, text in self._named.items()}
        if len(self._values) == 1 and isinstance(self._values[0], dict):
            return (), self._values[0]
        if len(self._values) == 1 and isinstance(self._values[0], list):
            return self._values[0], {}
        return self._values, {}


def _schemas(client: Client, task: str) -> dict[str, Any]:
    """The parameters of `task` by name; none where the service tells nothing, as the original's do."""
    try:
        tasks = client.using(timeout=_ASK).call("acomm.tasks")
    except ConnectionLost:
        raise
    except AcommError:
        return {}
    for known in tasks if isinstance(tasks, list) else ():
        if known["name"] == task:
            properties: dict[str, Any] = known["args"].get("properties", {})
            return properties
    return {}


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise ValueError("no JSON") from None


def _is_json(text: str) -> bool:
    try:
        _json(text)
    except ValueError:
        return False
    return True


def read_value(text: str, schema: dict[str, Any] | None) -> Any:
    """A value from the command line: JSON where that fits the parameter's schema, else text."""
    try:
        value = _json(text)
    except ValueError:
        return text
    wanted = json_types(schema)
    if wanted is None or not {"string"} & wanted:
        return value
    kind = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    found = kind.get(type(value), "null")
    return value if found in wanted or (found == "integer" and "number" in wanted) else text


def json_types(schema: dict[str, Any] | None) -> set[str] | None:
    """The JSON types that a schema names; None where it leaves that open."""
    if not schema:
        return None
    if "type" in schema:
        types = schema["type"]
        return {types} if isinstance(types, str) else set(types)
    if "enum" in schema:
        return {"string"} if any(isinstance(item, str) for item in schema["enum"]) else None
    found: set[str] = set()
    for part in schema.get("anyOf", ()):
        types = json_types(part)
        if types is None:
            return None
        found |= types
    return found or None


def open_source(path: str) -> IO[bytes]:
    """The file at `path`, or standard input for "-". Raises ValueError in one line."""
    try:
        # Unbuffered: a thread that waits in a buffered stdin would keep the program from ending.
        if path == "-":
            return open(os.dup(0), "rb", buffering=0)
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error.strerror}") from None


def copy(stream: Stream, output: IO[bytes]) -> None:
    """Copy a stream as it comes. Raises ConnectionLost, and what `write` raises."""
    stream.format = None  # bytes, whatever is in them
    with stream:
        for chunk in stream:
            write(chunk, output)


def write(data: bytes, output: IO[bytes]) -> None:
    """Write and flush. Exits quietly when nobody reads the output any more. Raises AcommError when it takes
    no more.
    """
    try:
        output.write(data)
        output.flush()
    except OSError as error:
        # What is left in its buffer must not fail once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(EXIT_BROKEN_PIPE)
        raise AcommError(f"the output cannot be written: {error.strerror}") from None


class Display:
    """Shows on stderr how far a call is, while the `with` block lasts: a bar on a terminal, else a line for
    each change.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._bar if sys.stderr.isatty() else self._lines, name="acomm-progress", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _lines(self) -> None:
        shown = ""
        while True:
            over = self._over.wait(_LOOK)
            line = describe(self._call.progress)
            if line and line != shown:
                shown = line
                print(line, file=sys.stderr, flush=True)
            if over:
                return

    def _bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            row: TaskID = bar.add_task("", total=None)
            while not self._over.wait(_LOOK):
                if (progress := self._call.progress) is not None:
                    bar.update(
                        row, description=describe(progress), total=progress.total, completed=progress.done
                    )


def describe(progress: Progress | None) -> str:
    """In one line: state, "done of total", note."""
    if progress is None:
        return ""
    done = f"{progress.done:g}" if progress.total is None else f"{progress.done:g} of {progress.total:g}"
    parts = [progress.state, done if progress.done or progress.total else "", progress.note]
    return printable(" ".join(part for part in parts if part))


def shown(receipt: dict[str, Any]) -> list[str]:
    """The lines of a receipt that tell a person most, each safe to print: where Python was, the last that was
    printed to stderr. Receipts come over the wire, so anything may be in them.
    """
    lines = []
    dump = receipt.get("dump")
    if isinstance(dump, str) and dump.strip():
        lines += ["its stack, the innermost first:", *_indented(_stack(dump)[:SHOWN_LINES])]
    errors = receipt.get("stderr")
    if isinstance(errors, str) and errors.strip():
        lines += ["its last words on stderr:", *_indented(errors.rstrip().split("\n")[-SHOWN_LINES:])]
    return lines


def _stack(dump: str) -> list[str]:
    """The lines of the thread that a fatal signal hit, or that was asked: faulthandler calls it current."""
    lines = dump.rstrip().split("\n")
    first = next((n for n, line in reversed([*enumerate(lines)]) if line.startswith("Current thread")), -1)
    rest = lines[first + 1 :]
    end = next((n for n, line in enumerate(rest) if not line.startswith("  ")), len(rest))
    return [line.strip() for line in rest[:end] if not _OURS.search(line)] or lines


def _indented(lines: list[str]) -> list[str]:
    return [f"  {printable(line.expandtabs(4), _LINE)}" for line in lines]


def drain(client: Client, timeout: float | None, say: Callable[[str], None]) -> None:
    """Have the supervisor finish what it has, within `timeout` seconds (None: however long that takes), and
    end; returns when it is gone. `say` is told what is left, whenever that has changed. Raises AcommError.
    """
    begun: dict[str, Any] = client.call("acomm.drain", timeout)
    pid, told = begun["pid"], ""
    gone = threading.Event()
    while True:
        try:
            figures = client.stats()
        except ConnectionLost:
            return
        if figures["pid"] != pid:
            return  # another has taken its place
        left = _left(figures)
        if left != told:
            say(f"acomm: {left}")
            told = left
        gone.wait(_LOOK)


def _left(figures: dict[str, Any]) -> str:
    parts = {
        "queued": figures["queued"],
        "running": figures["assigned"],
        "passed on": figures["forwarded"],
        "answers to deliver": figures["hooks"]["pending"],
    }
    return "left: " + (", ".join(f"{count} {what}" for what, count in parts.items() if count) or "nothing")
