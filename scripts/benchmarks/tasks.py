"""The tasks that the supervisor under measurement serves."""

from __future__ import annotations

from workers import task


def identity(value: int) -> int:
    """As little work as there can be, with an argument and a result to check."""
    return value


echo = task(name="echo")(identity)
