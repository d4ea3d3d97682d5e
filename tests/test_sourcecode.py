"""Measuring source files: exact figures on small snippets, nasty files, totals, real files."""

import json
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from workers.sourcecode import FileReport, FunctionReport, Totals, analyse, merge, standard_library

Analyse = Callable[[str | bytes], FileReport]


@pytest.fixture
def report_of(tmp_path: Path) -> Analyse:
    def run(source: str | bytes) -> FileReport:
        path = tmp_path / "snippet.py"
        path.write_bytes(source if isinstance(source, bytes) else textwrap.dedent(source).encode())
        return analyse(str(path))

    return run


@pytest.mark.parametrize(
    ("body", "complexity"),
    [
        ("pass", 1),
        ("if a: pass", 2),
        ("if a: pass\nelse: pass", 2),
        ("if a: pass\nelif b: pass\nelif c: pass\nelse: pass", 4),
        ("for x in a: pass", 2),
        ("for x in a: pass\nelse: pass", 2),
        ("async for x in a: pass", 2),
        ("while a: pass", 2),
        ("while a:\n    if b: break", 3),
        ("try: pass\nfinally: pass", 1),
        ("try: pass\nexcept A: pass\nexcept B: pass\nelse: pass", 3),
        ("try: pass\nexcept* A: pass", 2),
        ("with a as b, c: pass", 1),
        ("async with a: pass", 1),
        ("assert a", 2),
        ("assert a and b", 3),
        ("return a and b", 2),
        ("return a and b and c", 3),
        ("return a and b or c and d", 4),
        ("return not a", 1),
        ("return 0 < a < 1", 1),
        ("return b if a else c", 2),
        ("return [x for x in a]", 2),
        ("return {x for x in a if x}", 3),
        ("return {x: y for x in a if x if y for y in x}", 5),
        ("return any(x async for x in a if x or b)", 4),
        ("return lambda: b if a else c", 2),
        ("return f'{b if a else c}'", 2),
        ("match a:\n    case 1: pass", 2),
        ("match a:\n    case 1: pass\n    case [_, *_]: pass\n    case _: pass", 3),
        ("match a:\n    case 1 | 2: pass\n    case other: pass", 3),
        ("match a:\n    case _ if b: pass", 2),
        ("match a:\n    case x if b and c: pass", 3),
    ],
)
def test_the_complexity_of_a_construct(report_of: Analyse, body: str, complexity: int) -> None:
    report = report_of("async def f():\n" + textwrap.indent(body, "    "))
    assert report.error is None
    assert report.most_complex == [FunctionReport("f", 1, complexity)]
    assert report.complexity_total == complexity + 1


def test_a_function_is_counted_on_its_own_under_its_qualified_name(report_of: Analyse) -> None:
    report = report_of(
        """
        if a: pass

        def outer(x=1 if a else 2):
            if a: pass
            def inner():
                if a and b and c: pass
            class Local:
                if a: pass
                def method(self): pass
            return inner

        class Class:
            if a: pass

            class Inner:
                @decorate(a or b)
                async def method(self) -> "c":
                    while a: pass
        """
    )
    assert report.most_complex == [
        FunctionReport("outer.inner", 6, 4),
        FunctionReport("outer", 4, 3),
        FunctionReport("Class.Inner.method", 18, 2),
        FunctionReport("outer.Local.method", 10, 1),
    ]
    assert (report.functions, report.classes) == (4, 3)
    # The module's own: one, its `if`, the default, the body of Class, the decorator.
    assert report.complexity_total == 10 + 5


def test_only_the_ten_most_complex_functions_are_named_and_all_are_counted(report_of: Analyse) -> None:
    report = report_of(
        "".join(f"def f{n}(): return [{'a or ' * n} a]\n" for n in range(15)) + "def g(): pass"
    )
    assert [function.name for function in report.most_complex] == [f"f{n}" for n in range(14, 4, -1)]
    assert report.functions == 16
    assert report.complexity_total == sum(range(1, 16)) + 1 + 1


def test_every_line_is_code_a_comment_or_blank(report_of: Analyse) -> None:
    report = report_of(
        '''\
        # a comment
        """A docstring

        of three lines."""

        x = 1  # beside code
        y = (
            # inside code
            x
        )
        z = f"""{x}

        """
        '''
    )
    assert (report.lines, report.code_lines, report.comment_lines) == (13, 10, 2)


def test_bytes_are_counted_as_they_are_on_disk_and_compressed(report_of: Analyse) -> None:
    source = "# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1") + b"x = 1\r\n" * 1000
    report = report_of(source)
    assert report.error is None
    assert (report.bytes, report.lines) == (len(source), 1002)
    assert 0 < report.compressed_bytes < 200


def test_an_empty_file_is_one_path_through_nothing(report_of: Analyse) -> None:
    report = report_of(b"")
    assert (report.error, report.lines, report.functions, report.complexity_total) == (None, 0, 0, 1)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(b"def f(:\n    pass\n", id="syntax"),
        pytest.param(b"print 'hello'\n", id="python 2"),
        pytest.param(b"x = (1,\n", id="unclosed"),
        pytest.param(b"x = '''\n", id="unclosed string"),
        pytest.param(b"if a:\n        x\n    y\n", id="dedent"),
        pytest.param(b"x = 1\n\0\n", id="null byte"),
        pytest.param(b"x = '\xf6'\n", id="not utf-8"),
        pytest.param(b"# coding: uft-8\nx = 1\n", id="unknown encoding"),
        pytest.param(b"# coding: base64\nx = 1\n", id="not a text encoding"),
        pytest.param(b"\xef\xbb\xbf# coding: latin-1\nx = 1\n", id="contradicting encodings"),
        pytest.param("x = 1\n".encode("utf-16"), id="utf-16"),
        pytest.param(b"(" * 1000 + b")" * 1000, id="deep brackets"),
        pytest.param(b"x = " + b"-" * 50_000 + b"1\n", id="deep expression"),
        pytest.param(b"".join(b" " * n + b"if a:\n" for n in range(150)), id="deep blocks"),
        pytest.param(b"x = " + b"9" * 10_000 + b"\n", id="huge number"),
    ],
)
def test_a_file_that_is_not_python_is_a_report_with_an_error(report_of: Analyse, source: bytes) -> None:
    report = report_of(source)
    assert report.error is not None
    assert "Error" in report.error
    assert (report.bytes, report.lines) == (len(source), len(source.splitlines()))
    assert report.compressed_bytes > 0
    assert (report.code_lines, report.functions, report.complexity_total) == (0, 0, 0)


def test_a_file_that_cannot_be_read_is_a_report_with_an_error(tmp_path: Path) -> None:
    for path in [str(tmp_path / "absent.py"), str(tmp_path), "null\0byte.py"]:
        report = analyse(path)
        assert report == FileReport(path, error=report.error)
        assert report.error


def test_the_error_says_where(report_of: Analyse) -> None:
    error = report_of("x = 1\ny = = 2\n").error
    assert error is not None
    assert error.startswith("SyntaxError: ")
    assert "snippet.py, line 2" in error


def test_nesting_too_deep_for_a_recursive_visitor_is_measured(report_of: Analyse) -> None:
    # An `elif` lies inside the one before it, and ast.NodeVisitor takes two frames for each.
    depth = sys.getrecursionlimit() // 2
    report = report_of("def f():\n    if a: pass\n" + "    elif a: pass\n" * depth)
    assert report.error is None
    assert report.complexity_total == depth + 2 + 1


def test_warnings_of_old_source_are_silent(report_of: Analyse) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = report_of(r"x = '\d' is 1if a else 2" + "\nassert (x, 'always true')\n")
    assert report.error is None
    assert caught == []


def function(name: str, complexity: int) -> FunctionReport:
    return FunctionReport(name, 7, complexity)


def test_totals_sum_and_count_the_failed() -> None:
    totals = merge(
        [
            FileReport("a.py", bytes=100, lines=10, functions=2, compressed_bytes=40),
            FileReport("b.py", bytes=50, lines=5, compressed_bytes=30, error="SyntaxError: no"),
        ]
    )
    assert json.loads(json.dumps(totals.as_dict())) == {
        "files": 2,
        "lines": 15,
        "bytes": 150,
        "compressed_bytes": 70,
        "functions": 2,
        "failed": 1,
        "top": [],
    }
    assert repr(totals) == "<Totals 2 files, 1 failed, 2 functions>"


def test_totals_keep_the_ten_most_complex_functions_in_whatever_order_they_come() -> None:
    reports = [
        FileReport(f"{n:02}.py", most_complex=[function("big", 10 + n % 6), function("small", 1)])
        for n in range(20)
    ]
    forwards, backwards = merge(reports), merge(reversed(reports))
    assert forwards.top == backwards.top
    assert [entry[0] for entry in forwards.top] == [15, 15, 15, 14, 14, 14, 13, 13, 13, 12]
    assert forwards.top[0] == (15, "big", "17.py", 7)
    assert forwards.as_dict()["top"][0] == {"complexity": 15, "name": "big", "path": "17.py", "line": 7}


def test_totals_start_empty() -> None:
    assert Totals().as_dict() == merge([]).as_dict()
    assert Totals().top == []


def test_the_standard_library_is_listed_with_and_without_its_tests() -> None:
    everything, without_tests = standard_library(), standard_library(tests=False)
    assert everything == sorted(everything)
    assert set(without_tests) <= set(everything)
    assert {Path(path).name for path in without_tests} >= {"ast.py", "tokenize.py", "queues.py"}
    for path in everything:
        assert path.endswith(".py")
        assert not {"site-packages", "dist-packages", "__pycache__"} & set(Path(path).parts)
    root = Path(json.__file__).parent.parent
    for path in without_tests:
        assert not {"test", "tests", "idle_test"} & set(Path(path).relative_to(root).parent.parts)


def test_real_files_are_measured_whole() -> None:
    paths = standard_library(tests=False)[::20]
    reports = [analyse(path) for path in paths]
    assert len(reports) > 20
    for report in reports:
        assert report.error is None
        assert 0 <= report.code_lines + report.comment_lines <= report.lines
        assert report.compressed_bytes <= report.bytes + 20
        assert report.complexity_total >= 1 + report.functions
        assert len(report.most_complex) == min(10, report.functions)
        json.dumps(asdict(report))
    totals = merge(reports)
    assert (totals.files, totals.failed) == (len(paths), 0)
    assert totals.lines == sum(report.lines for report in reports)
    assert len(totals.top) == 10


def test_the_standard_librarys_own_nasty_files_never_raise() -> None:
    nasty = [path for path in standard_library() if Path(path).name.startswith("bad")]
    for report in map(analyse, nasty):
        assert report.error is None or report.bytes > 0
