"""The examples in the documents are run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acomm.errors import TaskError
from workers import launch

ROOT = Path(__file__).parent.parent
ACOMM = str(Path(sys.executable).with_name("acomm"))


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def block_with(text: str) -> str:
    """The one program in the guide that has `text` in it."""
    (block,) = [block for block in blocks("docs/guide.md", "python") if text in block]
    return block


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A supervisor with the tasks of the README and the guide; the environment to call it."""
    (tmp_path / "sums.py").write_text(blocks("README.md", "python")[0])
    guide = tmp_path / "guide.py"
    guide.write_text(blocks("docs/guide.md", "python")[0].replace("...", "return path"))
    (tmp_path / "flows.py").write_text(block_with("def squares"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    door = {"http": "127.0.0.1:0", "http_token_file": "app.token"}
    with launch("sums", "guide", "flows", workers=2, drain_timeout=5, **door) as client:
        yield {
            **os.environ,
            "ACOMM_URL": client.url,
            "ACOMM_SOCKET": client.url.removeprefix("unix://"),
            "DOOR": client.stats()["http"]["url"],
            "PATH": f"{Path(ACOMM).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path),
        }


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.process
@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are for curl")
def test_the_calls_over_http_print_what_they_are_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sums.py").write_text(blocks("README.md", "python")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("docs/http.md", "sh") for line in block.splitlines()]
    (making,) = [line for line in lines if line.startswith("(umask")]
    calls = [line.rpartition("# prints ") for line in lines if line.startswith("curl")]
    assert len(calls) == 4
    with launch("sums", workers=1, http="127.0.0.1:0", http_token_file="app.token") as client:
        door = client.stats()["http"]["url"]
        assert run(["sh", "-c", making], dict(os.environ)).returncode == 0
        assert (tmp_path / "auth").stat().st_mode & 0o077 == 0
        for command, _, said in calls:
            done = run(["sh", "-c", command.replace("http://127.0.0.1:8080", door)], dict(os.environ))
            assert (done.stdout + done.stderr).strip() == said


def test_the_statuses_in_the_documents_are_those_of_the_door() -> None:
    from workers.httpreplies import STATUSES

    section = (ROOT / "docs/http.md").read_text().partition("| status | codes")[2].partition("\n\n")[0]
    told = {
        (code, int(status))
        for status, codes in re.findall(r"^\| (\d+) \| ([^|]*)", section, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }
    # A path without anything and a method that it has not are told by their status alone.
    others = {("bad_request", 404), ("bad_request", 405), ("forbidden", 401), ("error", 503)}
    assert told == set(STATUSES.items()) | others


@pytest.mark.process
def test_the_calls_in_the_readme_print_what_they_are_said_to(served: dict[str, str]) -> None:
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    calls = [line.partition(" # ") for line in lines if "acomm call" in line]
    assert len(calls) == 5
    for command, _, said in calls:
        command = command.replace("http://127.0.0.1:8080", served["DOOR"])
        done = run(["sh", "-c", command], served)
        said = said.strip().removeprefix("prints ")
        assert (done.stdout + done.stderr).strip() == said


@pytest.mark.process
def test_the_programs_in_the_readme_run(served: dict[str, str], tmp_path: Path) -> None:
    programs = [block for block in blocks("README.md", "python") if "with " in block]
    assert len(programs) == 3
    log = tmp_path / "totals.txt"
    os.mkfifo(log)  # reading it waits for the handler, which runs when the program has ended
    outputs = []
    for program in programs:
        done = run([sys.executable, "-c", program.replace("/tmp/totals.txt", str(log))], served)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs == ["499500\n[45, 190, 435]\n", "499500\n", ""]
    assert log.read_text().split()[1] == "499500"


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "printed"), [("def square(", "285"), ("def scaled(", "6 2"), ("min_workers=1)", "999000")]
)
def test_the_pools_in_the_guide_run(tmp_path: Path, name: str, printed: str) -> None:
    """As a script, since what is __main__'s is what executors stumble over."""
    script = tmp_path / "script.py"
    script.write_text(block_with(name))
    done = run([sys.executable, "-W", "error", str(script)], {**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr) == (f"{printed}\n", "")


@pytest.mark.process
def test_the_receipt_in_the_guide_is_had(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(block_with("capture=True"))
    done = run([sys.executable, "-W", "error", str(script)], {**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "6 reading a.png\n\nTrue\n", done.stderr
    assert done.stderr.startswith("reading a.png\nFatal Python error: Aborted\n")


@pytest.mark.process
def test_the_coroutines_in_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fetching.py").write_text(block_with("async def fetch("))
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run([sys.executable, "-W", "error", "-c", block_with('launch("fetching.py"')], environment)
    assert (done.stdout, done.stderr) == ("page 7\n", "")


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "start"), [("async def main(", "main()"), ("async def ask(", "ask(os.environ['ACOMM_URL'])")]
)
def test_the_programs_in_the_guide_run(served: dict[str, str], name: str, start: str) -> None:
    program = block_with(name) + f"\nimport asyncio, os\nprint(asyncio.run({start}))\n"
    done = run([sys.executable, "-W", "error", "-c", program], served)
    assert done.returncode == 0, done.stderr
    assert "3" in done.stdout


@pytest.mark.process
def test_the_calls_in_the_guide_print_what_they_are_said_to(served: dict[str, str]) -> None:
    tasks = block_with("from app.tasks import add").replace("app.tasks", "guide")
    streams = block_with("async def first_over(") + "\nimport asyncio\nprint(asyncio.run(first_over(50)))\n"
    for program, printed in ((tasks, ["3", "(3, 4)"]), (streams, ["0", "1", "4", "2", "64"])):
        done = run([sys.executable, "-W", "error", "-c", program], served)
        assert (done.stdout.splitlines(), done.stderr) == (printed, "")


@pytest.mark.process
def test_the_streams_in_the_guide_are_what_they_are_said_to(served: dict[str, str]) -> None:
    program = (
        block_with("async def read(") + "\nimport asyncio, os\nasyncio.run(read(os.environ['ACOMM_URL']))\n"
    )
    done = run([sys.executable, "-W", "error", "-c", program], served)
    assert done.stdout.splitlines() == ["['0', '1', '4']", "2"], done.stderr


@pytest.mark.process
def test_the_reload_in_the_guide_brings_new_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run([sys.executable, "-W", "error", "-c", block_with("GREETING")], dict(os.environ))
    assert (done.stdout, done.stderr) == ("hello\ngood morning\n", "")


@pytest.mark.process
def test_the_limits_in_the_guide_are_told(served: dict[str, str]) -> None:
    done = run([sys.executable, "-W", "error", "-c", block_with("calls[1].position")], served)
    assert done.returncode == 0, done.stderr
    assert "[49999995000000, 4950]" in done.stdout
    assert "'max_queued': 1000" in done.stdout


@pytest.mark.process
def test_the_isolated_calls_in_the_guide_are_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "converts.py").write_text(block_with("@task(isolated=True)"))
    monkeypatch.chdir(tmp_path)
    with launch("converts", workers=2) as client:
        assert len({client.call("convert", "a.png") for _ in range(5)}) == 5


@pytest.mark.process
def test_the_memory_in_the_guide_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.py").write_text(block_with("def count_words"))
    (tmp_path / "few.txt").write_text("one two three")
    with open(tmp_path / "many.txt", "wb") as file:
        file.truncate(300_000_000)
    monkeypatch.chdir(tmp_path)
    with launch("words", workers=1) as client:
        assert client.call("count_words", str(tmp_path / "few.txt")) == 3
        with pytest.raises(TaskError, match=r"may take 200.0 MB \(max_memory\), and wanted more"):
            client.call("count_words", str(tmp_path / "many.txt"))


@pytest.mark.process
def test_the_shared_runs_in_the_guide_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared.py").write_text(block_with("def report").replace("...", "return user + color"))
    monkeypatch.chdir(tmp_path)
    with launch("shared", workers=1) as client:
        calls = [client.submit("report", *arguments) for arguments in (["ann"], ["ann", "today", "red"])]
        assert calls[0].result(60) == "annblue"
        assert calls[1].result(60) in ("annblue", "annred")  # the first may have ended


@pytest.mark.process
@pytest.mark.skipif(shutil.which("node") is None, reason="the client is for Node.js")
def test_the_client_in_the_protocol_runs(served: dict[str, str], tmp_path: Path) -> None:
    (program,) = blocks("docs/protocol.md", "js")
    client = tmp_path / "client.mjs"
    client.write_text(program.replace("/tmp/hook-", f"{tmp_path}/hook-"))
    done = run(["node", str(client)], served)
    assert (done.stdout, done.stderr) == ("499500\n", "")
    client.write_text(client.read_text().replace("n: 1000", "n: 'many'"))
    done = run(["node", str(client)], served)
    assert (done.stdout, done.stderr) == ("task total: argument n: expected int, got str\n", "")


@pytest.mark.process
def test_the_flows_of_the_readme_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = [block for block in blocks("README.md", "python") if "def squares" in block]
    (tmp_path / "flows.py").write_text(program)
    monkeypatch.syspath_prepend(str(tmp_path))
    with launch("flows", workers=1) as client:
        assert list(client.submit("squares", 3)) == [0, 1, 4]
        assert client.using(stream=b"one\ntwo\n").call("count_lines") == 2


def anchors(path: Path) -> set[str]:
    """What the headings of a document can be linked by, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_everything_that_is_linked_exists() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", document.read_text())
        for target, anchor in links:
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name} links to {target}"
            assert not anchor or anchor in anchors(path), f"{document.name} links to {target}#{anchor}"


def test_every_module_is_in_the_architecture() -> None:
    tables = (ROOT / "ARCHITECTURE.md").read_text().partition("## Processes")[0].split("| `workers` |")
    for package, table in zip(("acomm", "workers"), tables, strict=True):
        first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
        modules = {path.stem for path in (ROOT / package).glob("*.py") if not path.stem.startswith("__")}
        assert modules - {"acomm"} <= set(re.findall(r"`(\w+)`", first_cells))


def test_every_setting_and_option_is_in_the_guide() -> None:
    from workers.config import Config
    from workers.servecommand import serve

    guide = (ROOT / "docs/guide.md").read_text()
    shown = {option for parameter in serve.params for option in parameter.opts if option.startswith("--")}
    shown -= {"--settings", "--workers"}
    missing = [option for option in sorted(shown) if f"`{option}" not in guide]
    missing += [name for name in Config.__struct_fields__ if f"| `{name}` |" not in guide]
    assert missing == []


def test_the_codes_in_the_protocol_are_those_of_the_errors() -> None:
    from acomm.errors import WIRE_ERRORS

    section = (ROOT / "docs/protocol.md").read_text().partition("## Error codes")[2].partition("##")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(WIRE_ERRORS)
