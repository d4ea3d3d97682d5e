"""Config: where settings come from, which of them wins, and what is said of a bad one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from workers.config import Config, available_cpus
from workers.errors import ConfigError


def load(given: dict[str, Any] | None = None, file: Path | None = None, **environ: str) -> Config:
    return Config.load(given or {}, file=file, environ=environ)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "acomm.toml"


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACOMM_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    config = load()
    assert config.workers == available_cpus() == len(os.sched_getaffinity(0))
    assert config.socket == "/run/user/7/acomm/acomm.sock"
    assert (config.modules, config.allow_uid, config.allow_gid) == ((), (), ())
    assert config.max_frame == 64 * 1024 * 1024
    assert config.drain_timeout == 10
    assert (config.term_grace, config.capture) == (0.2, True)
    assert config.stream_expiry == 60


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(toml: Path) -> None:
    toml.write_text('workers = 1\nmax_frame = 1111\ndrain_timeout = 1\nsocket = "/file"\n')
    config = load(
        {"workers": 3, "max_frame": None},
        toml,
        ACOMM_WORKERS="2",
        ACOMM_MAX_FRAME="2222",
        ACOMM_SOCKET="/env",
    )
    assert (config.workers, config.max_frame, config.drain_timeout) == (3, 2222, 1)
    assert config.socket == "/env"


def test_workers_may_be_from_so_many_to_so_many(toml: Path) -> None:
    toml.write_text('workers = "1:4"\n')
    assert [load({"workers": "2:8"}).min_workers, load({"workers": "2:8"}).workers] == [2, 8]
    assert (load({}, toml).min_workers, load({}, toml).workers) == (1, 4)
    config = load({}, toml, ACOMM_WORKERS="3:5")
    assert (config.min_workers, config.workers) == (3, 5)
    config = load({"workers": "6"}, toml, ACOMM_WORKERS="3:5")
    assert (config.min_workers, config.workers) == (None, 6)  # so many, and not fewer
    config = load({"workers": 6, "min_workers": 2}, toml)
    assert (config.min_workers, config.workers) == (2, 6)
    assert Config.from_json(msgspec.json.encode(config).decode()) == config


@pytest.mark.parametrize(
    ("workers", "fault"),
    [
        ("8:2", "min_workers is 8, and workers only 2"),
        ("0:2", "workers must be 1 or more, not '0:2'"),
        ("2:", "settings: workers must be a number or MIN:MAX, not '2:'"),
        (":2", "workers must be a number or MIN:MAX"),
        ("1:2:3", "workers must be a number or MIN:MAX"),
        ("many", "workers must be a number or MIN:MAX, not 'many'"),
        ("-1", "workers must be a number or MIN:MAX"),
    ],
)
def test_a_bad_number_of_workers_is_told(workers: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        load({"workers": workers})


def test_a_file_may_have_a_table_of_ours(toml: Path) -> None:
    toml.write_text('[other]\nworkers = 9\n[acomm]\nworkers = 4\nmodules = ["a", "b"]\n')
    config = load(file=toml)
    assert (config.workers, config.modules) == (4, ("a", "b"))


def test_lists_in_the_environment_have_commas() -> None:
    config = load(ACOMM_ALLOW_UID="1, 2,3", ACOMM_MODULES="app.tasks,other", ACOMM_ALLOW_GID="")
    assert config.allow_uid == (1, 2, 3)
    assert config.modules == ("app.tasks", "other")
    assert config.allow_gid == ()


def test_variables_that_are_not_ours() -> None:
    assert load(ACOMM_URL="unix:///x", ACOMM_NOTHING="1", WORKERS="7").workers == available_cpus()


def test_a_path_may_be_a_path() -> None:
    assert load({"socket": Path("/run/s.sock")}).socket == "/run/s.sock"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", 0),
        ("workers", "two"),
        ("workers", True),
        ("workers", 1.5),
        ("socket", 7),
        ("socket", ""),
        ("allow_uid", (-1,)),
        ("allow_uid", 5),
        ("allow_gid", ("staff",)),
        ("max_frame", 10),
        ("max_frame", 2**31),
        ("drain_timeout", -1),
        ("term_grace", -1),
        ("capture", "perhaps"),
        ("drain_timeout", float("nan")),
        ("drain_timeout", float("inf")),
        ("modules", "app"),
        ("wrokers", 1),
    ],
)
def test_a_bad_setting_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        load({name: value})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("WORKERS", "two"),
        ("WORKERS", "0"),
        ("MAX_FRAME", "64M"),
        ("ALLOW_UID", "nobody"),
        ("DRAIN_TIMEOUT", "inf"),
    ],
)
def test_a_bad_variable_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"ACOMM_{name}"):
        load(**{f"ACOMM_{name}": text})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("workers = 'two'", "workers"),
        ("wrokers = 2", "wrokers"),
        ("[acomm]\nwrokers = 2", "wrokers"),
        ("acomm = 7", "must be a table"),
        ("workers = ", "not valid TOML"),
        ("drain_timeout = nan", "drain_timeout"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(toml: Path, text: str, fault: str) -> None:
    toml.write_text(text)
    with pytest.raises(ConfigError, match=fault) as caught:
        load(file=toml)
    assert "acomm.toml" in str(caught.value)


def test_a_file_that_cannot_be_read(toml: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(file=toml)
    toml.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(file=toml)
    with pytest.raises(ConfigError, match="Is a directory"):
        load(file=toml.parent)


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, 0o600),
        ({"allow_gid": (7,)}, 0o660),
        ({"allow_gid": (7, 8)}, 0o666),
        ({"allow_uid": (7,)}, 0o666),
        ({"allow_uid": (7,), "allow_gid": (7,)}, 0o666),
    ],
)
def test_the_sockets_mode(given: dict[str, Any], mode: int) -> None:
    assert load(given).socket_mode == mode
