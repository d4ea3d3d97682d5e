"""The layers: a module imports strictly lower ones, and heavy libraries stay where they belong.

Imports inside functions and under TYPE_CHECKING count: they are dependencies all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = 99

ACOMM = {
    "accepted": 0,
    "deadlines": 0,
    "errors": 0,
    "origin": 0,
    "room": 0,
    "within": 0,
    "framing": 1,
    "handlers": 1,
    "hosts": 1,
    "jsontext": 1,
    "parcel": 1,
    "urls": 1,
    "away": 2,
    "egress": 2,
    "members": 2,
    "outbox": 2,
    "socketpath": 2,
    "tokens": 2,
    "transport": 2,
    "acks": 3,
    "httpegress": 3,
    "messages": 3,
    "streamsocket": 3,
    "connection": 4,
    "outgoing": 4,
    "streamreaders": 4,
    "streamsources": 4,
    "httpchannel": 5,
    "itemstream": 5,
    "listener": 5,
    "sources": 5,
    "streamproxy": 5,
    "unixchannel": 5,
    "unixstreams": 5,
    "calls": 6,
    "channel": 6,
    "streams": 6,
    "delivery": 7,
    "submitting": 7,
    "tracker": 9,
    "multi": 10,
    "orphans": 10,
    "watch": 10,
    "client": 11,
    "tracking": 8,
    "defaultclient": 12,
    "__init__": TOP,
}

WORKERS = {
    "callers": 0,
    "callkey": 0,
    "ending": 0,
    "errors": 0,
    "forecast": 0,
    "forked": 0,
    "futures": 0,
    "handlerthreads": 0,
    "interrupts": 0,
    "lineage": 0,
    "memory": 0,
    "oomkills": 0,
    "offering": 3,
    "openapi": 0,
    "importing": 1,
    "options": 0,
    "places": 0,
    "promises": 0,
    "recent": 0,
    "restarts": 0,
    "scaling": 0,
    "scoreboard": 0,
    "segments": 0,
    "signature": 0,
    "sinks": 0,
    "sourcecode": 0,
    "tails": 0,
    "taskview": 0,
    "admission": 1,
    "buffers": 1,
    "calling": 1,
    "calls": 1,
    "capture": 1,
    "config": 1,
    "descriptors": 1,
    "httpaccess": 1,
    "httpconnections": 2,
    "httpreplies": 1,
    "memorylimit": 1,
    "registry": 2,
    "service": 1,
    "softlimit": 1,
    "door": 4,
    "failures": 2,
    "lanes": 2,
    "launcher": 2,
    "pickling": 2,
    "provider": 2,
    "unixdoor": 4,
    "journalplace": 1,
    "journalfile": 2,
    "journal": 3,
    "stored": 4,
    "failed": 10,
    "replaying": 5,
    "running": 2,
    "sharing": 2,
    "streaming": 2,
    "template": 2,
    "takeover": 2,
    "successor": 3,
    "verbs": 11,
    "coroutines": 3,
    "demo": 3,
    "exchange": 3,
    "forkserver": 3,
    "mapped": 3,
    "overlapping": 3,
    "workerloop": 3,
    "dispatcher": 5,
    "pickledworker": 4,
    "generations": 4,
    "processes": 6,
    "worker": 4,
    "receipts": 6,
    "pool": 7,
    "reloading": 8,
    "driver": 8,
    "engines": 8,
    "examining": 4,
    "outlook": 8,
    "keeping": 9,
    "operation": 9,
    "supervisor": 12,
    "cli": 14,
    "mapping": 9,
    "executor": 10,
    "joblib": 11,
    "failedcommands": 6,
    "commands": 2,
    "servecommand": 13,
    "router": 0,
    "poolview": 6,
    "workerprocess": 5,
    "assigning": 4,
    "__init__": TOP,
    "__main__": TOP,
}

LAYERS = {"acomm": ACOMM, "workers": WORKERS}

ONLY_IN = {
    "dill": {"acomm/handlers.py"},
    "click": {
        "workers/cli.py",
        "workers/commands.py",
        "workers/demo.py",
        "workers/failedcommands.py",
        "workers/servecommand.py",
    },
    "rich": {"workers/calling.py", "workers/commands.py", "workers/demo.py"},
    "aiohttp": {
        "acomm/channel.py",
        "acomm/httpchannel.py",
        "acomm/httpegress.py",
        "acomm/outgoing.py",
        "acomm/streamproxy.py",
        "acomm/streamreaders.py",
        "acomm/tracker.py",
        "workers/door.py",
        "workers/httpconnections.py",
        "workers/httpreplies.py",
    },
}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Every module that is imported anywhere in `tree`: line and full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([package, source] if source else [package])
            # `from acomm import urls` imports acomm.urls.
            names = [f"{source}.{alias.name}" for alias in node.names] if source in LAYERS else [source]
            yield from ((node.lineno, name) for name in names)


def target(name: str) -> tuple[str, str] | None:
    """The package and module of ours that a full name means."""
    package, _, rest = name.partition(".")
    if package not in LAYERS:
        return None
    module = rest.partition(".")[0]
    return package, module if module and (ROOT / package / f"{module}.py").exists() else "__init__"


def faults(package: str, module: str, source: str) -> list[str]:
    own = LAYERS[package][module]
    found = []
    for line, name in imports(ast.parse(source), package):
        where = f"{package}/{module}.py:{line}: imports {name}"
        homes = ONLY_IN.get(name.partition(".")[0])
        if homes is not None and f"{package}/{module}.py" not in homes:
            found.append(f"{where}, which is for {' and '.join(sorted(homes))} alone")
        if (to := target(name)) is None:
            continue
        if package == "acomm" and to[0] == "workers":
            found.append(f"{where}: acomm knows nothing of workers")
        elif to[0] == package and LAYERS[package].get(to[1], -1) >= own:
            found.append(f"{where}, which is not below it ({own})")
    return found


def modules() -> list[tuple[str, str]]:
    return [(package, path.stem) for package in LAYERS for path in sorted((ROOT / package).glob("*.py"))]


@pytest.mark.parametrize(("package", "module"), modules())
def test_a_module_imports_only_what_is_below_it(package: str, module: str) -> None:
    table = LAYERS[package]
    assert module in table, f"{package}/{module}.py has no layer: add it to the table in {__file__}"
    source = (ROOT / package / f"{module}.py").read_text()
    assert not (found := faults(package, module, source)), "\n".join(found)


def test_there_are_no_packages_within_that_nobody_looks_into() -> None:
    nested = [path for package in LAYERS for path in (ROOT / package).glob("*/**/*.py")]
    assert nested == []


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("acomm", "urls", "from acomm.tracker import Tracker"),
        ("acomm", "urls", "import acomm.tracker"),
        ("acomm", "urls", "from acomm import tracker"),
        ("acomm", "urls", "from . import tracker"),
        ("acomm", "urls", "from .tracker import Tracker"),
        ("acomm", "urls", "from acomm import jsontext"),  # its own layer
        ("acomm", "urls", "from acomm import Request"),  # the package as a whole
        ("acomm", "urls", "def f():\n    from acomm.tracker import Tracker"),
        ("acomm", "urls", "if TYPE_CHECKING:\n    import acomm.channel as c"),
        ("acomm", "urls", "import dill"),
        ("acomm", "client", "import workers.errors"),
        ("acomm", "client", "from rich.table import Table"),
        ("workers", "pool", "from workers.supervisor import Supervisor"),
        ("workers", "pool", "def f():\n    import click"),
    ],
)
def test_the_check_sees_an_upward_import(package: str, module: str, source: str) -> None:
    assert len(faults(package, module, source)) == 1


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("acomm", "urls", "from acomm.errors import BadRequest\nimport re"),
        ("acomm", "handlers", "def f():\n    import dill.detect"),
        ("workers", "errors", "from acomm.client import connect"),
        ("workers", "commands", "import click\nfrom rich import print"),
    ],
)
def test_the_check_lets_a_downward_import_pass(package: str, module: str, source: str) -> None:
    assert faults(package, module, source) == []
