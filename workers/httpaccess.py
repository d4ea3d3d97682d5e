"""Who may use the HTTP door, and where it listens: addresses, hosts and the token. It knows no HTTP library.

A browser on the same host reaches loopback addresses for any page that it shows. Two checks keep such
pages out: the Host must be one of ours, or a name that a stranger's DNS leads here (DNS rebinding) would
do; and an Origin, which browsers send along with what a page writes, must be that same host. The token
keeps out everybody else, other users of this host among them.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

from acomm import socketpath, urls
from acomm.errors import AddressInUse, BadRequest
from workers.errors import ConfigError, printable

MIN_TOKEN = 32
"""Characters; in any usual alphabet at least 128 bits."""

BACKLOG = 1024
_MAX_TOKEN = 4096
_TOKEN_BYTES = 32
_USER_TIMEOUT = 60_000
"""Milliseconds after which the kernel gives up on a peer that takes nothing of what we send."""

_address = re.compile(r"(?:\[([^\[\]\s]*)\]|([^:\[\]\s]*)):([0-9]{1,5})")
_host = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?", re.ASCII)
_token = re.compile(r"[\x21-\x7e]+", re.ASCII)


# -- where it listens -----------------------------------------------------------------------------------


class Address(NamedTuple):
    """Where to listen: a name or an address as it was given, without brackets, and a port (0: any)."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """`HOST:PORT` or `[IPV6]:PORT`. Raises ConfigError."""
        match = _address.fullmatch(text)
        if match is None:
            raise ConfigError(f"http must be HOST:PORT, such as 127.0.0.1:8080, not {printable(text)}")
        host, port = match[1] or match[2], int(match[3])
        if not host:
            raise ConfigError(
                f"http needs a host before the port, not {printable(text)}: 127.0.0.1 for this host alone, "
                "0.0.0.0 for all its networks"
            )
        if port > 65535:
            raise ConfigError(f"http: the port must be at most 65535, not {port}")
        return cls(host, port)

    def url(self) -> str:
        return f"http://{bracketed(self.host)}:{self.port}"

    def resolve(self) -> tuple[socket.AddressFamily, tuple[str, int]]:
        """The family and the numeric address to bind. Raises ConfigError."""
        try:
            found = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
            )
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"http: cannot find the host {printable(self.host)}: {reason}") from None
        # `localhost` is 127.0.0.1 to most programs that have no names.
        family, _, _, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
        return family, (str(address[0]), self.port)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def listen(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    """A socket that listens there. Raises AddressInUse or ConfigError."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What is accepted inherits it: a peer that reads nothing must not hold its connection for ever.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        where = Address(*address).url()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"cannot listen at {where}: the port is in use") from None
        raise ConfigError(f"cannot listen at {where}: {error.strerror}") from None
    return sock


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


# -- hosts and origins ----------------------------------------------------------------------------------


class Hosts:
    """The names that this service answers to: those of the loopback, the address that it is bound to,
    `names` (each with a port or without, in which case any port will do), and the host of `public_url`.
    Raises ConfigError for a name that is none.
    """

    def __init__(self, bound: str, names: Iterable[str] = (), public_url: str | None = None) -> None:
        self._names = {"localhost", "127.0.0.1", "[::1]", bracketed(bound).lower()}
        self._with_port: set[tuple[str, str]] = set()
        for name in names:
            self._add(name)
        if public_url is not None:
            self._names.add(bracketed(urlsplit(public_url).hostname or "").lower())

    def _add(self, name: str) -> None:
        match = _host.fullmatch(name.lower())
        if match is None:
            raise ConfigError(f"http_host must be NAME or NAME:PORT, not {printable(name)}")
        if match[2] is None:
            self._names.add(match[1])
        else:
            self._with_port.add((match[1], match[2]))

    def allows(self, host: str | None) -> bool:
        """Whether a request with that Host header may pass."""
        if host in self._names:
            return True
        match = None if host is None else _host.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1].rstrip(".")
        return name in self._names or (name, match[2] or "80") in self._with_port

    @staticmethod
    def same_origin(origin: str, host: str) -> bool:
        """Whether a page of `origin` comes from the very host that it writes to. What stands between may
        have put TLS before us, so either scheme will do.
        """
        scheme, _, rest = origin.lower().partition("://")
        return scheme in ("http", "https") and rest == host.lower()


def is_address(host: str | None, address: str) -> bool:
    """Whether a Host header names the IP `address` that the connection came in at: no DNS leads there."""
    match = None if host is None else _host.fullmatch(host.lower())
    return match is not None and match[1] == bracketed(address)


def check_public_url(url: str) -> str:
    """The URL by which others reach the door, without a slash at its end. Raises ConfigError."""
    try:
        urls.check(url, "http_url")
    except BadRequest as error:
        raise ConfigError(str(error)) from None
    # Even one that is empty: paths are put behind it.
    if urlsplit(url).scheme not in ("http", "https") or "?" in url or "#" in url:
        raise ConfigError(f"http_url must be an http or https URL without a query, not {printable(url)}")
    return url.rstrip("/")


# -- the token ------------------------------------------------------------------------------------------


class Token:
    """The secret that callers show. It is neither in a repr nor in an error."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def fits(self, header: str | None) -> bool:
        """Whether an Authorization header shows it: `Bearer TOKEN`. Takes the same time for any other
        token of its length.
        """
        if header is None:
            return False
        scheme, _, given = header.partition(" ")
        shown = given.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(shown, self._secret) and scheme.lower() == "bearer"

    @classmethod
    def load(cls, path: str) -> Token:
        """The token in the file at `path`, which is made, with a new one, if it is missing.

        Raises ConfigError for a file that others can read or change, or that holds no token.
        """
        for _ in range(2):
            try:
                return cls(_read_token(path))
            except FileNotFoundError:
                _make_token(path)
        raise ConfigError(f"the token file {printable(path)} is made and removed by somebody else")


def _read_token(path: str) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read the token file {printable(path)}: {error.strerror}") from None
    try:
        _check_owner(path, os.fstat(descriptor))
        data = os.read(descriptor, _MAX_TOKEN + 1)
    finally:
        os.close(descriptor)
    text = data.decode("ascii", "replace").removesuffix("\n").removesuffix("\r")
    if not _token.fullmatch(text) or not MIN_TOKEN <= len(text) <= _MAX_TOKEN:
        raise ConfigError(
            f"the token file {printable(path)} must hold one line of {MIN_TOKEN} or more characters, without "
            "spaces; remove it, and a new one is made"
        )
    return text


def _check_owner(path: str, info: os.stat_result) -> None:
    what = f"the token file {printable(path)}"
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{what} is not a plain file")
    if info.st_uid not in (0, os.getuid()):
        raise ConfigError(f"{what} belongs to uid {info.st_uid}, not to you or root")
    # Root gives a service its secret by a group; our own file has no reason to.
    wider = 0o037 if info.st_uid != os.getuid() else 0o077
    if info.st_mode & wider:
        raise ConfigError(f"others can use {what} (mode {stat.S_IMODE(info.st_mode):o}): chmod it to 600")


def _make_token(path: str) -> None:
    """A new token at `path`: there at once and whole, and never in place of another's."""
    folder, name = os.path.split(os.path.abspath(path))
    socketpath.check_folder(folder)
    draft = os.path.join(folder, f".{name}-{secrets.token_hex(6)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(_TOKEN_BYTES) + "\n")
            os.link(draft, path)
        except FileExistsError:
            pass  # somebody was faster; theirs is read
        finally:
            os.unlink(draft)
    except OSError as error:
        raise ConfigError(f"cannot make the token file {printable(path)}: {error.strerror}") from None
