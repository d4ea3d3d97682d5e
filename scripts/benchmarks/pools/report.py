"""The tables: medians of the rounds, and how ours compares; for a terminal and in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from benchmarks.harness import Spread
from benchmarks.pools.cases import CASES, Column, Table
from benchmarks.pools.contenders import CONTENDERS, OURS, STANDARD
from benchmarks.pools.samples import Sample

BEST = "the best other"

WIDTH = 150
"""Columns of characters where there is no terminal to ask."""


class Cell(NamedTuple):
    """What stands in the table. Without a figure, `note` says why there is none."""

    figure: Spread | None
    note: str


class Results:
    """All cells of the rounds that were measured."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._found: dict[tuple[str, str], dict[int, float]] = {}
        self._notes: dict[tuple[str, str], str] = {}
        self._failed: dict[tuple[str, str], list[str]] = {}
        for sample in samples:
            key = (sample.column, sample.contender)
            if sample.value is not None:
                self._found.setdefault(key, {})[sample.round] = sample.value
            else:
                self._failed.setdefault(key, []).append(sample.note)
            self._notes.setdefault(key, sample.note)
        measured = {sample.column for sample in samples}
        columns = [c for case in CASES.values() for c in case.columns if c.name in measured]
        self.tables: dict[Table, list[Column]] = {}
        for column in columns:
            self.tables.setdefault(column.table, []).append(column)
        self._names = list(dict.fromkeys(sample.contender for sample in samples if sample.round == 0))

    def contenders(self, table: Table) -> list[str]:
        """Those with a figure or a reason in the table, the floors last."""
        here = [
            name
            for name in self._names
            if any((column.name, name) in self._notes for column in self.tables[table])
        ]
        return sorted(here, key=lambda name: name not in CONTENDERS)

    def cell(self, column: Column, name: str) -> Cell:
        key = (column.name, name)
        values = self._found.get(key)
        note = self._notes.get(key, "")
        if values is None:
            return Cell(None, note)
        note = note if column.note else ""
        if failed := self._failed.get(key):
            note = f"({len(failed)} of {len(failed) + len(values)} rounds: {failed[0]})"
        return Cell(Spread.of(list(values.values())), note)

    def best(self, column: Column) -> str | None:
        """The other pool with the best median, if any has one."""
        others = [name for name in CONTENDERS if name != OURS and (column.name, name) in self._found]
        sign = -1 if column.more_is_better else 1
        return min(
            others, key=lambda name: sign * median(self._found[column.name, name].values()), default=None
        )

    def ratio(self, column: Column, other: str | None) -> Spread | None:
        """How many times as good ours is, within the rounds: above 1, ours is better."""
        ours = self._found.get((column.name, OURS), {})
        theirs = {} if other is None else self._found.get((column.name, other), {})
        pairs = [(ours[n], theirs[n]) for n in ours if n in theirs and ours[n] > 0 and theirs[n] > 0]
        if not pairs:
            return None
        return Spread.of([a / b if column.more_is_better else b / a for a, b in pairs])


def rows(results: Results, table: Table) -> Iterator[tuple[str, list[str]]]:
    """The table's lines: a name, and the text of each column."""
    columns = results.tables[table]
    for name in results.contenders(table):
        label = CONTENDERS[name].label if name in CONTENDERS else name
        yield label, [cell_text(results.cell(column, name), column.form) for column in columns]
    if any(results.cell(column, OURS).figure for column in columns):
        yield (
            f"ours : {STANDARD}",
            [_ratio_text(results.ratio(c, STANDARD)) for c in columns],
        )
        best = [results.best(column) for column in columns]
        texts = [_ratio_text(results.ratio(c, name)) for c, name in zip(columns, best, strict=True)]
        yield (
            f"ours : {BEST}",
            [f"{text} {name}" if text else "" for text, name in zip(texts, best, strict=True)],
        )
        for name in results.contenders(table):
            if name not in CONTENDERS:
                yield f"ours : {name}", [_ratio_text(results.ratio(column, name)) for column in columns]


def cell_text(cell: Cell, form: str) -> str:
    if cell.figure is None:
        return cell.note
    text = spread_text(cell.figure, form)
    return f"{text} {cell.note}" if cell.note else text


def _ratio_text(ratio: Spread | None) -> str:
    return "" if ratio is None else spread_text(ratio, ".2f")


def spread_text(spread: Spread, form: str) -> str:
    if spread.low == spread.high:
        return f"{spread.median:{form}}"
    return f"{spread.median:{form}} ({spread.low:{form}} - {spread.high:{form}})"


def markdown(results: Results) -> str:
    parts = []
    for table, columns in results.tables.items():
        head = ["", *(column.heading for column in columns)]
        lines = [
            f"**{table.title}**: {table.about}.",
            "",
            _line(head),
            _line(["---", *["--:"] * len(columns)]),
        ]
        lines += [_line([name, *texts]) for name, texts in rows(results, table)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show(results: Results) -> None:
    """The tables, on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table, columns in results.tables.items():
        shown = RichTable(
            title=f"{table.title}: {table.about}", box=box.SIMPLE, title_justify="left", title_style="bold"
        )
        shown.add_column("")
        for column in columns:
            shown.add_column(column.heading, justify="right")
        for name, texts in rows(results, table):
            style = "bold" if name == OURS else "dim" if name.startswith("ours :") else ""
            shown.add_row(name, *texts, style=style)
        console.print(shown)
