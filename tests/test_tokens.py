"""Tokens: where a client finds its own, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from acomm.errors import ConfigError
from acomm.tokens import MAX_TOKEN, find_token

HTTP = "http://127.0.0.1:8080"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACOMM_TOKEN", raising=False)


def test_what_is_given_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token(HTTP, None, None) is None
    monkeypatch.setenv("ACOMM_TOKEN", "environment")
    (tmp_path / "token").write_text(" file\n")
    assert find_token(HTTP, None, None) == "environment"
    assert find_token(HTTP, "given", None) == "given"
    assert find_token(HTTP, None, tmp_path / "token") == "file"
    monkeypatch.setenv("ACOMM_TOKEN", "")
    assert find_token(HTTP, None, None) is None


def test_a_unix_socket_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACOMM_TOKEN", "x")
    assert find_token("unix:///s", None, None) is None
    with pytest.raises(ConfigError, match="a token is for HTTP"):
        find_token("unix:///s", "x", None)
    with pytest.raises(ConfigError, match="a token is for HTTP"):
        find_token("unix:///s", None, "/file")


@pytest.mark.parametrize("token", ["", "two words", "two\nlines", "é", "x\0", "x" * (MAX_TOKEN + 1)])
def test_what_is_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    with pytest.raises(ConfigError, match=r"^the token ") as caught:
        find_token(HTTP, token, None)
    assert not token or token not in str(caught.value)
    (tmp_path / "token").write_text(token)
    with pytest.raises(ConfigError, match=r"^the token file "):
        find_token(HTTP, None, tmp_path / "token")
    if token and "\0" not in token:
        monkeypatch.setenv("ACOMM_TOKEN", token)
        with pytest.raises(ConfigError, match=r"^\$ACOMM_TOKEN "):
            find_token(HTTP, None, None)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        find_token(HTTP, None, tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: it is not text"):
        find_token(HTTP, None, tmp_path / "binary")
    with pytest.raises(ConfigError, match="not both"):
        find_token(HTTP, "x", tmp_path / "none")
