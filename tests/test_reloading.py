"""New code in a running supervisor: it is served, what runs finishes, nothing is lost and nothing left."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from changing import App, settled, versions
from peers import WAIT
from serving import Fifo, Served, environment

from acomm.client import Client, connect
from acomm.errors import AcommError, BadArgs, UnknownTask
from workers import reloading


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path)


@pytest.fixture
def served(tmp_path: Path, app: App) -> Iterator[Served]:
    with Served(tmp_path, modules=("app",)) as supervisor:
        yield supervisor


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with connect(served.url) as client:
        yield client


@pytest.mark.process
def test_new_code_is_served(served: Served, client: Client, app: App) -> None:
    assert versions(client) == {"version 1"}
    app.write(2, more="@task\ndef extra(text: str) -> str:\n    return text\n")
    (app.folder / "helper.py").write_text("NAME = 'a new version'\n")
    assert "extra" in client.call("acomm.reload")["tasks"]
    settled(served)
    assert versions(client) == {"a new version 2"}
    assert client.call("extra", "x") == "x"
    with pytest.raises(BadArgs):
        client.call("extra", 1)
    app.write(3)
    client.call("acomm.reload")
    with pytest.raises(UnknownTask):
        client.call("extra", "x")
    assert served.process.poll() is None


@pytest.mark.process
def test_sighup_reloads_and_the_service_manager_is_told(served: Served, client: Client, app: App) -> None:
    app.write(2)
    served.signal(signal.SIGHUP)
    state, when = served.notified().split("\n")
    assert state == "RELOADING=1"
    assert when.startswith("MONOTONIC_USEC=")
    assert served.notified() == "READY=1"
    settled(served)
    assert versions(client) == {"version 2"}


@pytest.mark.process
@pytest.mark.parametrize("fault", ["1 / 0", "import nothing_like_it", "import os; os._exit(3)", "def f(:"])
def test_code_that_does_not_import_leaves_all_as_it_was(
    served: Served, client: Client, app: App, fault: str
) -> None:
    before = served.until(lambda stats: len(stats["workers"]) == 2)["workers"]
    app.write(2, more=fault)
    with pytest.raises(AcommError, match=r"app|template"):
        client.call("acomm.reload")
    assert versions(client) == {"version 1"}
    settled(served)
    assert [worker["pid"] for worker in served.stats()["workers"]] == [worker["pid"] for worker in before]
    app.write(3)
    client.call("acomm.reload")
    settled(served)
    assert versions(client) == {"version 3"}


@pytest.mark.process
def test_what_imports_only_elsewhere_leaves_all_as_it_was(served: Served, client: Client, app: App) -> None:
    app.write(2, more=f"assert os.getpid() != {served.pid}, 'not here'")
    with pytest.raises(AcommError, match="not here"):
        client.call("acomm.reload")
    settled(served)
    assert versions(client) == {"version 1"}


@pytest.mark.process
def test_a_call_that_runs_finishes_on_the_old_code(
    served: Served, client: Client, app: App, fifos: tuple[Fifo, Fifo]
) -> None:
    told, go = fifos
    calls = [client.submit("hold", told.path, go.path)]
    assert told.read() == "running"
    for number in (2, 3):
        app.write(number)
        client.call("acomm.reload")
        served.until(lambda stats: sum(worker["state"] == "ready" for worker in stats["workers"]) >= 2)
        assert f"version {number}" in versions(client)
    assert not calls[0].done()
    Path(go.path).write_text("1")
    assert calls[0].result(WAIT) == "1"
    settled(served)
    assert versions(client) == {"version 3"}


@pytest.mark.process
def test_a_later_reload_wins(served: Served, client: Client, app: App, fifos: tuple[Fifo, Fifo]) -> None:
    told, go = fifos
    app.write(2, more=f"open({told.path!r}, 'w').write('loading'); open({go.path!r}).read(1)")
    first = client.submit("acomm.reload")
    assert told.read() == "loading"
    app.write(3)
    client.call("acomm.reload")
    with pytest.raises(AcommError, match="later reload"):
        first.result(WAIT)
    settled(served)
    assert versions(client) == {"version 3"}


@pytest.mark.process
def test_ten_reloads_under_load_lose_nothing_and_leave_nothing(
    served: Served, client: Client, app: App, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    versions(client)
    settled(served)
    descriptors = psutil.Process(served.pid).num_fds()
    enough = threading.Event()
    sent: list[str] = []
    errors: list[BaseException] = []

    def load(who: int) -> None:
        try:
            with connect(served.url) as own:
                count = 0
                while not enough.is_set():
                    batch = [f"{who}-{count + n}" for n in range(8)]
                    count += 8
                    calls = [own.submit("note", str(runs), text) for text in batch]
                    assert [call.result(WAIT) for call in calls] == batch
                    sent.extend(batch)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    try:
        for number in range(2, 12):
            app.write(number)
            client.call("acomm.reload")
            assert [served.notified()[:11], served.notified()] == ["RELOADING=1", "READY=1"]
    finally:
        enough.set()
        for thread in threads:
            thread.join(WAIT)
    assert errors == []
    assert Counter(runs.read_text().split()) == Counter(sent)
    settled(served)
    assert versions(client) == {"version 11"}
    served.until(lambda stats: psutil.Process(served.pid).num_fds() <= descriptors)


@pytest.mark.process
def test_provider_sockets_follow(tmp_path: Path, app: App) -> None:
    provider = ("--provider-dir", str(tmp_path / "p"), "--provider-name", "me")
    with Served(tmp_path, *provider, modules=("app",)) as served, connect(served.url) as client:
        assert (tmp_path / "p/note/50-me.sock").is_socket()
        app.write(2, more="@task\ndef extra() -> int:\n    return 7\n")
        client.call("acomm.reload")
        assert (tmp_path / "p/extra/50-me.sock").is_socket()
        app.write(3)
        client.call("acomm.reload")
        assert not (tmp_path / "p/extra/50-me.sock").exists()
        assert (tmp_path / "p/note/50-me.sock").is_socket()


@pytest.mark.process
def test_the_command_reloads_or_says_why_not(served: Served, client: Client, app: App) -> None:
    def command() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from workers.cli import main; main()", "reload", "--url", served.url],
            env=environment(served.folder),
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )

    app.write(2)
    done = command()
    assert (done.returncode, done.stdout) == (0, "acomm: reloaded 3 tasks\n")
    app.write(3, more="raise ValueError('broken')")
    done = command()
    assert done.returncode == 1
    assert "broken" in done.stderr
    assert "app.py" in done.stderr


def test_libraries_and_ourselves_are_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, inside = ModuleType("own_module"), ModuleType("own_library")
    own.__file__ = str(tmp_path / "own_module.py")
    inside.__file__ = str(tmp_path / ".venv/lib/site-packages/own_library.py")
    for module in (own, inside):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    root = str(Path(__file__).parent.parent)
    forgotten = reloading.forget(["own_tasks"], [str(tmp_path)])
    assert forgotten == {"own_module": own}
    reloading.put_back(forgotten, ["own_tasks"], [str(tmp_path)])
    assert sys.modules["own_module"] is own
    names = reloading._own(["own_tasks"], [root])
    assert not [name for name in names if name.partition(".")[0] in ("acomm", "workers", "json", "msgspec")]
