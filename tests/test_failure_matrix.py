"""docs/reliability.md: each fault has tests that prove what is said of it, and those exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (HERE.parent / "docs" / "reliability.md").read_text().splitlines()
    if line.startswith("|") and "::" in line
]
NAMED = re.compile(r"`(test_\w+\.py)((?:::\w+)+)`")


def names_in(file: str) -> Iterator[str]:
    """The names of a file's tests, as pytest spells them."""
    for node in ast.parse((HERE / file).read_text()).body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"::{node.name}::{inner.name}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"::{node.name}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_fault_has_tests_that_exist(row: list[str]) -> None:
    _, _, told = row
    named = NAMED.findall(told)
    assert named
    assert NAMED.sub("", told).strip() == ""
    for file, name in named:
        assert name in set(names_in(file)), f"{file} has no {name}"


def test_no_row_is_left_out() -> None:
    section = (HERE.parent / "docs" / "reliability.md").read_text()
    section = section.partition("## Faults")[2].partition("\n## ")[0]
    assert len(ROWS) == sum(line.startswith("| ") for line in section.splitlines()) - 1
