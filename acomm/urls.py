"""URLs: plain strings in Python, Go `url.URL` objects on the wire.

In Python a URL is a string. `unix://` is followed by the path as it stands, never percent-encoded.
On the wire it is the object that Go's encoding/json makes of a `net/url.URL`; its eleven members
come and go with Go's versions and change their order, so they are read by name, in any case, and a
missing one is empty.

What Go dials for a unix URL is `RequestURI()`: `Opaque` as it stands, else the escaped path, with the
query behind a question mark; `ForceQuery` is that mark with an empty query. Paths that Go would escape
(spaces, `#`, non-ASCII) therefore cannot be reached through `Path`; we put those in `Opaque`, which Go
leaves alone. A fragment does not travel: no client sends it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from acomm.errors import BadRequest, printable

# urllib.parse costs a tenth of `import acomm`, and unix URLs do without it: imported where used.
if TYPE_CHECKING:
    from urllib.parse import SplitResult

HOOK_SCHEMES = frozenset({"unix", "http", "https"})
MAX_URL = 8192
MAX_UNIX_PATH = 107
"""Bytes; the kernel's `sun_path` holds 108 with the closing NUL."""

_MAX_CACHED = 1024
_go_path_safe = "/$&+,:;=@!~*'()"  # what Go's EscapedPath leaves alone, besides letters and digits
_plain_unix_path = re.compile(r"[A-Za-z0-9/._~$&+,:;=@-]*")
_loopback = re.compile(r"127(?:\.\d{1,3}){3}", re.ASCII)
_empty: dict[str, Any] = {
    "Scheme": "",
    "Opaque": "",
    "User": None,
    "Host": "",
    "Path": "",
    "RawPath": "",
    "OmitHost": False,
    "ForceQuery": False,
    "RawQuery": "",
    "Fragment": "",
    "RawFragment": "",
}
_types: dict[str, tuple[str, type]] = {
    name.lower(): (name, dict if value is None else type(value)) for name, value in _empty.items()
}


def unix_url(path: str) -> str:
    """The URL of the unix socket at `path`."""
    return "unix://" + path


def unix_path(url: str) -> str | None:
    """The socket's path if `url` is a unix URL, else None."""
    return url[7:] if url.startswith("unix://") else None


def go_dials(path: str) -> bool:
    """Whether Go programs that make a URL of `path` dial it as it stands; other characters they escape."""
    return _plain_unix_path.fullmatch(path) is not None


def scheme_of(url: str) -> str:
    return url.partition(":")[0].lower()


def check(url: str, what: str) -> None:
    """Refuse a URL that nothing can be sent to. Raises BadRequest, naming `what`."""
    if len(url) > MAX_URL:
        raise BadRequest(f"{what} is longer than {MAX_URL} characters")
    if not url.isprintable():
        raise BadRequest(f"{what} holds control characters: {printable(url)}")
    path = unix_path(url)
    if path is not None:
        if not path.startswith("/"):
            raise BadRequest(f"{what} needs an absolute socket path, not {printable(url)}")
        if len(path.encode()) > MAX_UNIX_PATH:
            raise BadRequest(
                f"{what}: the socket path is longer than {MAX_UNIX_PATH} bytes: {printable(url)}"
            )
        return
    if scheme_of(url) == "unix":
        raise BadRequest(f"{what} must be unix:// and an absolute socket path, not {printable(url)}")
    if scheme_of(url) not in HOOK_SCHEMES:
        raise BadRequest(f"{what} has an unknown scheme: {printable(url)}; known: unix, http, https")
    parts = _split(url, what)
    if not parts.hostname:
        raise BadRequest(f"{what} has no host: {printable(url)}")
    if parts.username is not None or parts.password is not None:
        raise BadRequest(f"{what} holds credentials, which do not travel in a Go URL object")


def redacted(url: str) -> str:
    """The URL as it may be told to others than its owner, without what often is a secret: user and password,
    and the values of its query.
    """
    if unix_path(url) is not None:
        return url
    url, question, query = url.partition("?")
    scheme, slashes, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    shown = scheme + slashes + authority.rpartition("@")[2] + slash + path.partition("#")[0]
    if not question:
        return shown
    return f"{shown}?{'&'.join(part.partition('=')[0] + '=...' for part in query.split('&') if part)}"


def replace_localhost(url: str, address: str) -> str:
    """The URL that somebody at the IP `address` means: in his mouth "localhost", 127.x.x.x, ::1 or no host
    at all is his own host. The port stays. Any other URL, and a unix one, is returned as it is.
    """
    if unix_path(url) is not None:
        return url
    scheme, _, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    host, port = _host_of(authority)
    if host and host.lower() != "localhost" and host != "[::1]" and not _loopback.fullmatch(host):
        return url
    named = f"[{address}]" if ":" in address else address
    return f"{scheme}://{named}{port}{rest[len(authority) :]}"


def _host_of(authority: str) -> tuple[str, str]:
    """Host and `:port` of an authority, the port empty if there is none."""
    host, colon, port = authority.rpartition(":")
    if not colon or port.endswith("]"):
        return authority, ""
    return host, colon + port


def _split(url: str, what: str) -> SplitResult:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        _ = parts.port  # parsed on access
    except ValueError as error:
        raise BadRequest(f"{what} is not a URL: {printable(url)} ({error})") from None
    return parts


@lru_cache(maxsize=1024)
def encode(url: str | None) -> bytes:
    """`url` as the JSON of a Go URL object (members in Go 1.19's order); None gives `null`."""
    if url is None:
        return b"null"
    members = dict(_empty)
    path = unix_path(url)
    if path is not None:
        members["Scheme"] = "unix"
        members["Path" if go_dials(path) else "Opaque"] = path
        return msgspec.json.encode(members)
    from urllib.parse import quote, unquote

    parts = _split(url, "the URL")
    decoded = unquote(parts.path)
    members["Scheme"] = parts.scheme
    members["User"] = {} if "@" in parts.netloc else None
    members["Host"] = parts.netloc.rpartition("@")[2]
    members["Path"] = decoded
    members["RawPath"] = "" if quote(decoded, safe=_go_path_safe) == parts.path else parts.path
    members["RawQuery"] = parts.query
    members["ForceQuery"] = not parts.query and url.partition("#")[0].endswith("?")
    return msgspec.json.encode(members)


def decode(raw: msgspec.Raw | None, what: str, localhost: str | None = None) -> str | None:
    """The URL of a Go URL object or a plain string; None for `null` or nothing. Raises BadRequest.

    `localhost` is the address of a sender on another host, for `replace_localhost`.
    """
    if raw is None:
        return None
    data = bytes(raw)
    # Strangers choose what comes here, so the cache keeps nothing large.
    read = _decode if len(data) > _MAX_CACHED else _decode_cached
    return read(data, what, localhost)


def _decode(data: bytes, what: str, localhost: str | None) -> str | None:
    if len(data) > 6 * MAX_URL:
        raise BadRequest(f"{what} is longer than {6 * MAX_URL} bytes")
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(f"{what}: {error}") from None
    if value is None or value == "":
        return None
    if isinstance(value, dict):
        value = _from_members(value, what)
    if not isinstance(value, str):
        raise BadRequest(f"{what} must be a URL object, not {type(value).__name__}")
    if localhost is not None:
        value = replace_localhost(value, localhost)
    check(value, what)
    return value


_decode_cached = lru_cache(maxsize=1024)(_decode)


def _from_members(members: dict[str, Any], what: str) -> str:
    url = dict(_empty)
    for key, value in members.items():
        name, kind = _types.get(key.lower(), (key, object))
        if value is not None and not isinstance(value, kind):
            raise BadRequest(f"{what}: {name} must be {kind.__name__}, not {type(value).__name__}")
        if value is not None:
            url[name] = value
    scheme = url["Scheme"].lower()
    query = f"?{url['RawQuery']}" if url["RawQuery"] or url["ForceQuery"] else ""
    if scheme == "unix":
        # RawPath, where Go sets it, is the text that the listener's owner wrote.
        return unix_url((url["Opaque"] or url["RawPath"] or url["Path"]) + query)
    if url["Opaque"]:
        return f"{scheme}:{url['Opaque']}{query}"
    from urllib.parse import quote

    path = url["RawPath"] or quote(url["Path"], safe=_go_path_safe)
    return f"{scheme}://{url['Host']}{path}{query}"
