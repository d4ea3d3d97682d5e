"""Measure Python source: lines, complexity, compressibility. The CPU-heavy work of the demo.

    path --read--> bytes --+-- zlib ------> compressed_bytes
                           +-- ast -------> functions, classes, complexity
                           +-- tokenize --> code_lines, comment_lines
                                                 |
                                             FileReport --Totals.add--> the most complex functions of all

One file is one call: it reads that file and nothing else, keeps no state, and most of its time is spent in
Python with the interpreter lock held, which is why threads do not help and processes do.

Complexity is the cyclomatic number of T. J. McCabe, "A Complexity Measure", IEEE Transactions on Software
Engineering SE-2(4), 1976, pp. 308-320, computed as he shows for structured code: the decisions plus one, each
condition of a compound predicate being a decision. What is a decision in Python follows the table of radon
(https://radon.readthedocs.io/en/latest/intro.html), with two differences: the `else` of a loop or a `try`
decides nothing and is not counted, and a `case` is counted, unless it is a bare `_`.
"""

from __future__ import annotations

import ast
import heapq
import io
import os
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FileReport", "FunctionReport", "Totals", "analyse", "merge", "standard_library"]

# The length of both tables of most complex functions, a file's and the total. A total of ten needs ten from
# each file to be exact.
_TOP = 10

# zlib rather than lzma, which at its highest level takes several hundred MB of memory, in every worker.
_ZLIB_LEVEL = 9

# What a file that is not Python can raise: SyntaxError (encodings and indentation included) and TokenError;
# ValueError for null bytes and undecodable text; LookupError for an encoding that is not one of text;
# RecursionError and MemoryError for nesting deeper than the parser's stack; OSError for a file that vanished
# or may not be read.
_UNREADABLE = (
    OSError,
    SyntaxError,
    tokenize.TokenError,
    ValueError,
    LookupError,
    RecursionError,
    MemoryError,
)

# One decision each. `with` is none: it always enters its body.
_DECISIONS: frozenset[type[ast.AST]] = frozenset(
    {ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert}
)

# Tokens that make no line a line of code: layout, comments, and the markers of the stream's ends.
_NOT_CODE = frozenset(
    {
        tokenize.COMMENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
        tokenize.INDENT,
        tokenize.NEWLINE,
        tokenize.NL,
    }
)

_NOT_STANDARD = frozenset({"__pycache__", "dist-packages", "site-packages"})
_TEST_DIRECTORIES = frozenset({"idle_test", "test", "tests"})


@dataclass(frozen=True, slots=True)
class FunctionReport:
    """A function: `name` is qualified (`Class.method`, `outer.inner`), `line` is the line of its `def`."""

    name: str
    line: int
    complexity: int


@dataclass(frozen=True, slots=True)
class FileReport:
    """What one source file measures.

    * `bytes`, `compressed_bytes`: of the source as it is on disk, and after zlib at its highest level.
    * `lines`: physical lines. `code_lines` hold some token other than a comment (a docstring is code),
      `comment_lines` hold a comment alone; the rest is blank.
    * `functions`, `classes`: how many are defined, at any depth, async ones included, lambdas not.
    * `complexity_total`: the sum over every function, plus that of the code outside them (at least 1).
    * `most_complex`: at most ten functions, the most complex first, equals in the order of their lines.
    * `error`: why the file could not be analysed, or None. With an error, what comes from the syntax is 0 or
      empty; what comes from the bytes is there, if the file could be read.
    """

    path: str
    bytes: int = 0
    lines: int = 0
    code_lines: int = 0
    comment_lines: int = 0
    functions: int = 0
    classes: int = 0
    complexity_total: int = 0
    most_complex: list[FunctionReport] = field(default_factory=list)
    compressed_bytes: int = 0
    error: str | None = None


class Totals:
    """The sum of the reports added; the order in which they are added makes no difference.

    `failed` counts the reports with an error; they count in `files`, and with their lines and bytes, as well.
    """

    def __init__(self) -> None:
        self.files = 0
        self.lines = 0
        self.bytes = 0
        self.compressed_bytes = 0
        self.functions = 0
        self.failed = 0
        # A heap with the least complex at its root, so that the one to displace is found at once.
        self._top: list[tuple[int, str, str, int]] = []

    def add(self, report: FileReport) -> None:
        self.files += 1
        self.lines += report.lines
        self.bytes += report.bytes
        self.compressed_bytes += report.compressed_bytes
        self.functions += report.functions
        self.failed += report.error is not None
        for function in report.most_complex:
            entry = (function.complexity, function.name, report.path, function.line)
            if len(self._top) < _TOP:
                heapq.heappush(self._top, entry)
            else:
                heapq.heappushpop(self._top, entry)

    @property
    def top(self) -> list[tuple[int, str, str, int]]:
        """`(complexity, name, path, line)` of the ten most complex functions, the most complex first."""
        return sorted(self._top, reverse=True)

    def as_dict(self) -> dict[str, Any]:
        """Every figure, as values that JSON can hold."""
        return {
            "files": self.files,
            "lines": self.lines,
            "bytes": self.bytes,
            "compressed_bytes": self.compressed_bytes,
            "functions": self.functions,
            "failed": self.failed,
            "top": [
                {"complexity": complexity, "name": name, "path": path, "line": line}
                for complexity, name, path, line in self.top
            ],
        }

    def __repr__(self) -> str:
        return f"<Totals {self.files} files, {self.failed} failed, {self.functions} functions>"


def merge(reports: Iterable[FileReport]) -> Totals:
    """The totals of `reports`."""
    totals = Totals()
    for report in reports:
        totals.add(report)
    return totals


def analyse(path: str) -> FileReport:
    """Measure the source file at `path`; a file that cannot be analysed is a report with an `error`.

    Not for several threads at once: silencing the warnings that old source causes changes the state of the
    process (https://docs.python.org/3/library/warnings.html#warnings.catch_warnings).
    """
    try:
        source = Path(path).read_bytes()
    except _UNREADABLE as error:
        return FileReport(path, error=_explain(error))
    size, lines = len(source), len(source.splitlines())
    compressed = len(zlib.compress(source, _ZLIB_LEVEL))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source, filename=path)
            code_lines, comment_lines = _count_lines(source)
        module, functions, classes = _measure(tree)
    except _UNREADABLE as error:
        return FileReport(path, size, lines, compressed_bytes=compressed, error=_explain(error))
    return FileReport(
        path=path,
        bytes=size,
        lines=lines,
        code_lines=code_lines,
        comment_lines=comment_lines,
        functions=len(functions),
        classes=classes,
        complexity_total=module.complexity + sum(function.complexity for function in functions),
        most_complex=[
            FunctionReport(function.name, function.line, function.complexity)
            for function in heapq.nsmallest(_TOP, functions, key=lambda f: (-f.complexity, f.line, f.name))
        ],
        compressed_bytes=compressed,
    )


def standard_library(tests: bool = True) -> list[str]:
    """The path of every .py file of the running interpreter's standard library, sorted.

    What is installed beside it (site-packages) is left out; so are the test packages, without `tests`: the
    directories named test, tests or idle_test, wherever they are.
    """
    skipped = _NOT_STANDARD if tests else _NOT_STANDARD | _TEST_DIRECTORIES
    return sorted(_python_files(sysconfig.get_path("stdlib"), skipped))


def _python_files(root: str, skipped: frozenset[str]) -> Iterator[str]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in skipped]
        for name in names:
            if name.endswith(".py"):
                yield str(Path(directory, name))


def _explain(error: BaseException) -> str:
    name, text = type(error).__name__, str(error)
    return f"{name}: {text}" if text else name


def _count_lines(source: bytes) -> tuple[int, int]:
    """The number of lines of code, and of lines that are a comment alone."""
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in _NOT_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code), len(comments - code)


@dataclass(slots=True)
class _Block:
    """A function, or the module, while its decisions are being counted."""

    name: str
    line: int
    complexity: int = 1


def _measure(tree: ast.Module) -> tuple[_Block, list[_Block], int]:
    """The block of the code outside functions, those of the functions, and the number of classes.

    A node goes with the block that it belongs to and the dotted prefix of names defined there. The stack is a
    list, since a visitor would recurse, and generated source nests deeper than the interpreter's limit.
    """
    module = _Block("", 1)
    functions: list[_Block] = []
    classes = 0
    stack: list[tuple[ast.AST, _Block, str]] = [(tree, module, "")]
    while stack:
        node, block, prefix = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = _Block(prefix + node.name, node.lineno)
            functions.append(function)
            stack.extend((child, function, f"{function.name}.") for child in node.body)
            # Decorators, defaults and annotations run where the function is defined.
            stack.extend((child, block, prefix) for child in _outside(node))
            continue
        if isinstance(node, ast.ClassDef):
            classes += 1
            prefix = f"{prefix}{node.name}."
        block.complexity += _decisions(node)
        stack.extend((child, block, prefix) for child in ast.iter_child_nodes(node))
    return module, functions, classes


def _outside(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    yield from node.decorator_list
    yield node.args
    if node.returns is not None:
        yield node.returns


def _decisions(node: ast.AST) -> int:
    """How many decisions `node` makes itself, without its children."""
    if type(node) in _DECISIONS:
        return 1
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    if isinstance(node, ast.match_case):
        return 0 if _is_bare_wildcard(node) else 1
    return 0


def _is_bare_wildcard(case: ast.match_case) -> bool:
    pattern = case.pattern
    return (
        case.guard is None
        and isinstance(pattern, ast.MatchAs)
        and pattern.pattern is None
        and pattern.name is None
    )
