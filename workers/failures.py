"""What becomes of an exception that a call has raised: text, which can travel whatever it is."""

from __future__ import annotations

import traceback

from workers.calls import Failure
from workers.errors import BadArgs, SoftTimeout

MAX_MESSAGE, MAX_TRACEBACK = 2000, 20_000
"""Characters of an exception's text that travel."""

own_files: set[str] = set()
"""Whose frames are left out at the beginning of a traceback: those of the modules that call tasks."""


def failure_of(error: BaseException, retry_on: tuple[type[BaseException], ...]) -> Failure:
    """An exception as text. It may be hostile: its `str` may raise, whatever it likes."""
    name = type(error).__name__[:200]
    try:
        text = _sound(str(error)[:MAX_MESSAGE])
    except BaseException as why:
        text = f"<its text cannot be had: {type(why).__name__[:200]}>"
    try:
        trail = error.__traceback__
        while trail is not None and trail.tb_frame.f_code.co_filename in own_files:
            trail = trail.tb_next
        trace = _sound("".join(traceback.format_exception(type(error), error, trail))[-MAX_TRACEBACK:])
    except BaseException:
        trace = None
    if isinstance(error, BadArgs):
        return Failure(error.code, text, name, trace)
    if isinstance(error, SoftTimeout):
        return Failure(error.code, text, name, trace, isinstance(error, retry_on))
    message = f"{name}: {text}" if text else name
    return Failure("task_error", message, name, trace, isinstance(error, retry_on))


def _sound(text: str) -> str:
    """Text that can be encoded: lone surrogates replaced."""
    return str.encode(text, "utf-8", "replace").decode()
