"""What a measurement finds, and what is kept of it."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A value in its column's unit, and what there is to say of it."""

    value: float
    note: str = ""


Figures = dict[str, Figure]
"""By column. What a contender cannot do is no figure: `contenders.Cannot` is raised."""


class Sample(NamedTuple):
    """One cell of one round: `value` is None where there is none, and `note` then says why."""

    round: int
    case: str
    column: str
    contender: str
    value: float | None
    note: str = ""
