"""The token that an HTTP door asks for: where a client finds its own, and what can be one."""

from __future__ import annotations

import os

from acomm.errors import ConfigError, printable
from acomm.urls import unix_path

MAX_TOKEN = 4096
"""Characters."""


def find_token(url: str, token: str | None, file: str | os.PathLike[str] | None) -> str | None:
    """The token for `url`: the one given, that of the file, or `$ACOMM_TOKEN`; None for a unix socket, which
    goes by the caller's uid. Raises ConfigError.
    """
    if token is not None and file is not None:
        raise ConfigError("give a token or a token file, not both")
    if unix_path(url) is not None:
        if token is not None or file is not None:
            raise ConfigError(f"a token is for HTTP, and {printable(url)} goes by your uid: leave it out")
        return None
    if file is not None:
        return _checked(_read(file), f"the token file {printable(os.fspath(file))}")
    if token is not None:
        return _checked(token, "the token")
    given = os.environ.get("ACOMM_TOKEN")
    return _checked(given, "$ACOMM_TOKEN") if given else None


def _read(file: str | os.PathLike[str]) -> str:
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read(MAX_TOKEN + 2).strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"the token file {printable(os.fspath(file))} cannot be read: {reason}") from None


def _checked(token: str, where: str) -> str:
    """What goes into a header: anything else could end the line, and is never printed."""
    if len(token) > MAX_TOKEN:
        raise ConfigError(f"{where} is longer than {MAX_TOKEN} characters")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where} holds no token: it must be one word of printable ASCII")
    return token
