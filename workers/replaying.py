"""What `acomm failed ID` shows, and `acomm replay --inline` runs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Any

import msgspec

from workers.calling import shown
from workers.errors import AcommError, BadArgs, printable
from workers.registry import Registry, Task, encode_result

MAX_RESULT = 1 << 31
"""Bytes of a result that is only printed."""


def told(failed: dict[str, Any]) -> list[str]:
    """All that is known of a failed request, as lines."""
    info = failed.get("error_info") or {}
    known = {**failed, "args": msgspec.json.encode(failed["args"]).decode()}
    known.pop("error_info", None)
    return [
        *(f"{name}: {printable(value, 10_000)}" for name, value in known.items()),
        *(f"    {printable(line, 10_000)}" for line in (info.get("traceback") or "").splitlines()),
        *shown(info.get("receipt") or {}),
    ]


def run(failed: dict[str, Any], modules: Iterable[str], *, debug: bool) -> msgspec.Raw:
    """Run a failed request's task in this process; the JSON of its result. With `debug` the debugger opens
    where it raises. Raises what the task raises, BadArgs when none of `modules` has it.
    """
    task = Registry.from_modules(modules).get(failed["task"])
    if task is None:
        raise BadArgs(f"no module that was named has the task {printable(failed['task'])}")
    if task.streams:
        raise BadArgs(f"the task {task.name} streams, and nobody would read it here")
    try:
        return msgspec.Raw(encode_result(_call(task, failed["args"]), MAX_RESULT))
    except AcommError:
        raise
    except Exception as error:
        if debug:
            import pdb  # noqa: T100 - what the user has asked for

            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            pdb.post_mortem(error.__traceback__)
        raise


def _call(task: Task[..., Any], args: Any) -> Any:
    positional, named = task.bind(msgspec.json.encode(args))
    result = task.function(*positional, **named)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result
