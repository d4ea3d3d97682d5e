"""The picture: a panel for each figure, a bar for each contender; lines where calls are queued."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Spread
from benchmarks.pools.cases import QUEUED, WEIGHT, Column, Table
from benchmarks.pools.contenders import CONTENDERS, OURS
from benchmarks.pools.report import Results

ACROSS = 4
"""Panels in a line."""

WIDE = 50
"""Times the least figure that the greatest may be, before a panel's scale is logarithmic."""

_FLOOR = "#bbbbbb"


def draw(results: Results, path: str, machine: str) -> None:
    """Write it to `path`, in the format that its ending names. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(t, c) for t, columns in results.tables.items() if t not in (QUEUED, WEIGHT) for c in columns]
    lines = [table for table in (QUEUED, WEIGHT) if table in results.tables]
    down = -(-(len(bars) + len(lines)) // ACROSS)
    figure, axes = pyplot.subplots(
        down, ACROSS, figsize=(4.6 * ACROSS, 2.7 * down), squeeze=False, layout="constrained"
    )
    panels = list(axes.flat)
    for panel, (table, column) in zip(panels, bars, strict=False):
        _bars(panel, results, table, column)
    for panel, table in zip(panels[len(bars) :], lines, strict=False):
        _lines(panel, results, table)
    for panel in panels[len(bars) + len(lines) :]:
        panel.set_axis_off()
    if lines:
        # The bars have their names beside them; the lines have theirs where there is room.
        panels[min(len(bars) + len(lines), len(panels) - 1)].legend(
            *panels[len(bars)].get_legend_handles_labels(), fontsize=8, loc="center left"
        )
    figure.suptitle(f"Two workers each; median, least and most of the rounds\n{machine}", fontsize=11)
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def _colour(name: str) -> str:
    if name not in CONTENDERS:
        return _FLOOR
    return f"C{(3, 0, 9, 2, 1, 4, 5, 6)[list(CONTENDERS).index(name) % 8]}"


def _bars(panel: Any, results: Results, table: Table, column: Column) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    names = results.contenders(table)[::-1]
    for place, name in enumerate(names):
        cell = results.cell(column, name)
        if cell.figure is None:
            panel.text(0.02, place, cell.note, transform=panel.get_yaxis_transform(), fontsize=7, va="center")
            continue
        middle = cell.figure.median
        panel.barh(place, middle, color=_colour(name), xerr=_reach([cell.figure]), ecolor="#555555")
        panel.text(middle, place, f" {middle:{column.form}}", fontsize=7, va="center")
    panel.set_yticks(range(len(names)), names, fontsize=7)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == OURS else "normal")
    panel.set_ylim(-0.6, len(names) - 0.4)
    panel.margins(x=0.25)
    panel.tick_params(axis="x", labelsize=7)
    found = [cell.figure.median for name in names if (cell := results.cell(column, name)).figure]
    if found and min(found) > 0 and max(found) > WIDE * min(found):
        panel.set_xscale("log")
        panel.set_xlim(min(found) / 2, 6 * max(found))
        panel.minorticks_off()
    else:
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.set_title(f"{table.title}: {column.heading}", fontsize=8, fontweight="bold")
    panel.set_xlabel(table.about, fontsize=7)


def _lines(panel: Any, results: Results, table: Table) -> None:
    columns = results.tables[table]
    for name in results.contenders(table):
        found = [(column, results.cell(column, name).figure) for column in columns]
        points = [(int(column.heading.replace(",", "")), figure) for column, figure in found if figure]
        if points:
            spreads = [figure for _, figure in points]
            panel.errorbar(
                [queued for queued, _ in points],
                [figure.median for figure in spreads],
                yerr=_reach(spreads),
                color=_colour(name),
                linewidth=2.5 if name == OURS else 1.2,
                marker="o",
                markersize=3,
                label=name,
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.tick_params(labelsize=7)
    panel.set_title(table.title, fontsize=8, fontweight="bold")
    panel.set_xlabel(table.about, fontsize=7)


def _reach(spreads: list[Spread]) -> list[list[float]]:
    """From the median down and up, as matplotlib wants it."""
    return [
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    ]
