"""The comparison of process pools still runs, and its tables say what was measured."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from benchmarks.pools import command, comparison
from benchmarks.pools.cases import CASES
from benchmarks.pools.contenders import OURS, STANDARD
from benchmarks.pools.report import Results, cell_text, markdown, rows
from benchmarks.pools.samples import Sample

TURNS = 10_000
"""Some tenths of a millisecond of work, where a case has work to do."""


@pytest.mark.process
@pytest.mark.parametrize("name", [OURS, STANDARD])
@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.sizes.least], ids=lambda case: case.name
)
def test_each_case_runs_in_its_smallest_form(case: comparison.Case, name: str) -> None:
    if case.name.startswith("echo") and find_spec("numpy") is None:
        pytest.skip("numpy comes with the bench extra")
    found = comparison.measure(case, name, case.sizes.least, TURNS)
    if case.name == "replacement" and name == STANDARD:
        assert found.cannot == "breaks: BrokenProcessPool"
        return
    assert not found.cannot
    assert set(found.figures) == {column.name for column in case.columns}


@pytest.mark.process
@pytest.mark.parametrize(
    "case, floor", [(case, floor) for case in CASES.values() for floor in case.floors if case.sizes.least]
)
def test_each_floor_runs(case: comparison.Case, floor: str) -> None:
    found = comparison.measure(case, floor, case.sizes.least, TURNS)
    assert set(found.figures) == {column.name for column in case.columns}


@pytest.mark.process
def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(comparison.Failed, match=r"(?s)trip, nobody: .*KeyError: 'nobody'"):
        comparison.measure(CASES["trip"], "nobody", 1, TURNS)


def test_the_figures_of_the_others_survive_a_measurement_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: comparison.Case, name: str, size: int, turns: int) -> comparison.Result:
        if name == STANDARD:
            raise comparison.Failed("it is broken")
        return comparison.Result({"submit": [100.0, ""]}, "", 1.0)

    monkeypatch.setattr(comparison, "measure", measure)
    samples, failures = comparison.compare(
        [CASES["submit"]], [OURS, STANDARD], 1, lambda case: 1, TURNS, lambda what: None
    )
    assert [str(failure) for failure in failures] == ["it is broken"]
    assert [(sample.contender, sample.value, sample.note) for sample in samples] == [
        (OURS, 100.0, ""),
        (STANDARD, None, "failed"),
    ]


@pytest.mark.process
def test_the_command_writes_what_it_has_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{command.BEGIN}old\n{command.END}after\n")
    arguments = ["--quick", "--case", "memory", "--contender", OURS]
    files = ["--json", str(tmp_path / "found.json"), "--markdown", str(document)]
    assert command.run([*arguments, *files], "a machine", lambda what: None) == 0
    assert "workers and helpers" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [sample["column"] for sample in found["samples"]] == ["pool", "all"]
    assert command.run(["--again", files[1], "--json", str(tmp_path / "again.json")], "", print) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found
    text = document.read_text()
    assert text.startswith(f"before\n{command.BEGIN}`scripts/bench pool --quick")
    assert text.endswith(f"{command.END}after\n") and "| PoolExecutor |" in text and "old" not in text


def _samples(case: str, column: str, values: dict[str, list[float | str]]) -> list[Sample]:
    """By contender, the figure of each round, or why there is none."""
    return [
        Sample(number, case, column, name, None, value)
        if isinstance(value, str)
        else Sample(number, case, column, name, value)
        for name, found in values.items()
        for number, value in enumerate(found)
    ]


def test_above_one_ours_is_better_be_it_more_or_less() -> None:
    figures: dict[str, list[float | str]] = {OURS: [200.0, 220.0, 180.0], STANDARD: [100.0, 100.0, 100.0]}
    for case, name, expected in (("submit", "submit", 2.0), ("trip", "p50", 0.5)):
        results = Results(_samples(case, name, figures))
        (columns,) = results.tables.values()
        ratio = results.ratio(columns[0], STANDARD)
        assert ratio is not None and ratio.median == expected


def test_the_best_other_is_named() -> None:
    figures: dict[str, list[float | str]] = {OURS: [200.0], STANDARD: [100.0], "loky": [400.0]}
    results = Results(_samples("submit", "submit", figures))
    (table,) = results.tables
    assert list(rows(results, table))[-1] == ("ours : the best other", ["0.50 loky"])


def test_a_cell_without_a_figure_says_why() -> None:
    figures: dict[str, list[float | str]] = {OURS: [200.0], "joblib": ["has no futures"]}
    results = Results(_samples("submit", "submit", figures))
    assert "| has no futures |" in markdown(results)


def test_rounds_that_failed_are_told_beside_the_figure_of_the_others() -> None:
    figures: dict[str, list[float | str]] = {"pebble": [40.0, "stuck", 50.0]}
    results = Results(_samples("replacement", "replaced", figures))
    (columns,) = results.tables.values()
    text = cell_text(results.cell(columns[0], "pebble"), ".0f")
    assert text == "45 (40 - 50) (1 of 3 rounds: stuck)"


def test_what_would_take_too_long_is_not_tried() -> None:
    case = CASES["queue-1000000"]
    seconds = comparison.LIMIT / case.growth + 1
    found = comparison.foreseen(case, OURS, {(case.after, OURS): seconds})
    assert found is not None and found.cannot == f"would take {seconds * case.growth:.0f} s"
    assert comparison.foreseen(case, OURS, {(case.after, OURS): seconds - 2}) is None
