"""Egress: the one policy for where a hook, a task URL or a stream URL may lead.

A service that posts to whatever URL a request names is a way round every firewall that it stands
behind. So a URL is judged by who asked for it, and judged twice:

    submission   Policy.admit(url, origin)         no DNS; the requester learns of a refusal at once
    connect      http(s): Policy.resolve(...)      names are resolved once, every address must pass,
                          httpegress.session(...)  and the connection goes to one of those addresses
                 unix: Policy.unix_target(...)     the file is opened, judged, and connected to by
                       Policy.check_unix_peer(...) its descriptor: another file of that name is no use

A Guard is a policy together with the one whose URLs it judges; whoever connects for others takes one.

What passes unless a rule allows more:

    scheme    unix, http, https; no credentials in the URL
    port      80, 443 and from 1024 up, less those that browsers block
    address   the public internet; loopback too for requests of our own user (or root) over the unix
              socket, and for the program itself
    spelling  one canonical one: no disguised numbers, percent signs, zones, or letters beyond ASCII
    unix      sockets of the requesting user; over HTTP none at all without trust
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Any, NamedTuple

from acomm import urls
from acomm.errors import BadRequest, Busy, ConfigError, Forbidden, printable
from acomm.hosts import (
    IP,
    Network,
    canonical_name,
    ends_in_number,
    host_and_port,
    kind_of,
    known_addresses,
    spelled_address,
    unmapped,
    usual_port,
)
from acomm.origin import Origin

_WANT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of a system call that are nobody's fault, and pass."""

_rule = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(?::(\*|[0-9]{1,5}))?", re.ASCII)
# What a name inside an organisation may well lead to. A rule that allows a name does not allow whoever
# runs its DNS to point it at the metadata service: for the other kinds the address itself must be allowed.
_named_kinds = frozenset({None, "loopback", "private", "shared (CGNAT)"})
_ucred = struct.Struct("iII")
_ANY_PORT = 0
_lookup_options: dict[str, Any] = {
    "type": socket.SOCK_STREAM,
    "proto": socket.IPPROTO_TCP,
    "flags": socket.AI_ADDRCONFIG,
}


class Address(NamedTuple):
    """A numeric address that a connection may go to. `family` is AF_INET or AF_INET6."""

    host: str
    port: int
    family: int


class _Rule(NamedTuple):
    """What a rule allows: a name or a network, at one port, any (0) or the usual ones (None)."""

    name: str | None
    network: Network | None
    port: int | None

    def takes_port(self, port: int) -> bool:
        return self.port == _ANY_PORT or (usual_port(port) if self.port is None else self.port == port)

    def covers(self, name: str | None, address: IP, kind: str | None, port: int) -> bool:
        if not self.takes_port(port):
            return False
        if self.network is not None:
            return address in self.network
        return self.name == name and kind in _named_kinds


@dataclass(frozen=True)
class Policy:
    """Where URLs may lead. `allow` holds the rules that widen it, each a text:

    `HOST`, `HOST:PORT`: a name, exactly; it may then resolve to loopback and private addresses, too.
    `ADDRESS`, `CIDR`, with or without `:PORT`; IPv6 stands in brackets: `[fd00::/8]:8080`.
    `unix:PATH`: the socket at PATH and all below that folder, whoever owns them.

    Without a port a rule is for the usual ones; `:*` is any port. Raises ConfigError for a rule that is
    none of these.
    """

    allow: Sequence[str] = ()
    _tcp: tuple[_Rule, ...] = field(init=False, repr=False, compare=False)
    _unix: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.allow, str):
            raise ConfigError(f"the rules must be a list of texts, not the text {printable(self.allow)}")
        rules = tuple(self.allow)
        object.__setattr__(self, "allow", rules)
        object.__setattr__(self, "_unix", tuple(_unix_rule(r) for r in rules if r.startswith("unix:")))
        object.__setattr__(self, "_tcp", tuple(_tcp_rule(r) for r in rules if not r.startswith("unix:")))

    # -- at submission ------------------------------------------------------------------------------

    def admit(self, url: str, origin: Origin, what: str = "the hook") -> None:
        """Judge a URL when it is asked for: `check`, and for a unix URL who owns the socket.

        Raises Forbidden, and Busy while there is no descriptor to look with. A socket that is not there yet
        passes for our own user, as it is judged again when it is connected to. Other users are told the same
        whether it is missing or another's: they may not ask us which files exist.
        """
        self.check(url, origin, what)
        path = urls.unix_path(url)
        if path is None:
            return
        try:
            os.close(self._open(path, origin, what))
        except OSError as error:
            if error.errno in _WANT:
                text = f"{what} cannot be looked at now: {error.strerror}"
                raise Busy(text, retry_after=1.0) from None
            if not origin.local:
                raise self._not_theirs(path, origin, what) from None
            if not isinstance(error, FileNotFoundError):
                raise Forbidden(f"{what} {printable(path)} cannot be reached: {error.strerror}") from None

    def check(self, url: str, origin: Origin, what: str = "the hook") -> None:
        """Judge a URL by its text alone: no DNS, no file is looked at. Raises Forbidden."""
        path = _unix_path(url, what)
        if path is None:
            host, port = host_and_port(url, what)
            self._check_host(host, port, origin, what)
        elif origin.via == "http" and not origin.trusted:
            raise Forbidden(f"{what} is a unix socket, which {origin} may name only with the token")

    def _check_host(self, host: str, port: int, origin: Origin, what: str) -> None:
        literal = spelled_address(host, what)
        if literal is not None:
            self._judge(None, literal, port, origin, what)
            return
        name = canonical_name(host)
        if name is None:
            raise Forbidden(f"{what} has a host that is no name: {printable(host)}")
        for address in known_addresses(name):
            self._judge(name, address, port, origin, what)
        # Whether a rule for some network covers this one is known when the name is resolved.
        if not usual_port(port) and not any(
            rule.takes_port(port) and (rule.network is not None or rule.name == name) for rule in self._tcp
        ):
            raise Forbidden(f"{what} leads to port {port}, which is not open to hooks")

    def _judge(self, name: str | None, address: IP, port: int, origin: Origin, what: str) -> None:
        """Judge one address, which `name` resolves to, or which stands in the URL (None)."""
        address = unmapped(address)
        kind = kind_of(address)
        if any(rule.covers(name, address, kind, port) for rule in self._tcp):
            return
        if not usual_port(port):
            raise Forbidden(f"{what} leads to port {port}, which is not open to hooks")
        if kind is None or (kind == "loopback" and origin.local):
            return
        where = f"{name} at {address}" if name else str(address)
        raise Forbidden(
            f"{what} leads to {where} ({kind}), which {origin} may not name; "
            f"an operator can allow it: --allow-hook {_as_rule(name, address, kind)}:{port}"
        )

    # -- at connect, http and https -----------------------------------------------------------------

    async def resolve(self, url: str, origin: Origin, what: str = "the hook") -> list[Address]:
        """Judge an http or https URL, resolve its host, and judge every address.

        Connect to one of these addresses, and do not resolve again: the next answer may differ. Raises
        Forbidden, and OSError (socket.gaierror) when the name does not resolve.
        """
        self.check(url, origin, what)
        host, port = host_and_port(url, what)
        return await self.lookup(host, port, socket.AF_UNSPEC, origin, what)

    def resolve_sync(self, url: str, origin: Origin, what: str = "the hook") -> list[Address]:
        """`resolve` for code without an event loop: it blocks while the name is looked up."""
        self.check(url, origin, what)
        host, port = host_and_port(url, what)
        known = self._known_address(host, port, origin, what)
        if known is not None:
            return [known]
        return self._judged(socket.getaddrinfo(host, port, **_lookup_options), host, port, origin, what)

    async def lookup(self, host: str, port: int, family: int, origin: Origin, what: str) -> list[Address]:
        """`resolve` for one host and port. `family` limits what is looked up, as in getaddrinfo."""
        known = self._known_address(host, port, origin, what)
        if known is not None:
            return [known]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, family=family, **_lookup_options)
        return self._judged(found, host, port, origin, what)

    def _known_address(self, host: str, port: int, origin: Origin, what: str) -> Address | None:
        """The address that `host` is, judged; None for a name, which has passed as far as it is known."""
        self._check_host(host, port, origin, what)
        literal = spelled_address(host, what)
        if literal is None:
            return None
        return Address(str(literal), port, socket.AF_INET if literal.version == 4 else socket.AF_INET6)

    def _judged(
        self, found: Sequence[Sequence[Any]], host: str, port: int, origin: Origin, what: str
    ) -> list[Address]:
        """What getaddrinfo has found, if all of it passes."""
        addresses = dict.fromkeys(Address(str(to[0]), port, int(kind)) for kind, _, _, _, to in found)
        if not addresses:
            raise OSError(f"{printable(host)} has no address")
        name = canonical_name(host)
        for address in addresses:
            bare = address.host.partition("%")[0]  # a zone does not change the kind
            self._judge(name, ipaddress.ip_address(bare), port, origin, what)
        return list(addresses)

    # -- at connect, unix ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def unix_target(self, url: str, origin: Origin, what: str = "the hook") -> Iterator[str]:
        """Judge a unix URL and give the path to connect to, good within the `with` block: it leads to the
        very file that was judged, whatever its name leads to by then.

        Raises Forbidden, OSError when the socket is not there or not for us. Call `check_unix_peer` with
        what was connected.
        """
        self.check(url, origin, what)
        path = _unix_path(url, what)
        if path is None:
            raise ValueError(f"not a unix URL: {printable(url)}")
        descriptor = self._open(path, origin, what)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)

    def check_unix_peer(self, sock: socket.socket, url: str, origin: Origin, what: str = "the hook") -> None:
        """Judge who listens at the other end of a connected socket, before a byte is written.

        The kernel tells the uid that called listen(), so a listener that was made by root and given away
        (systemd's socket activation) needs a rule. Raises Forbidden.
        """
        path = _unix_path(url, what)
        if path is None:
            raise ValueError(f"not a unix URL: {printable(url)}")
        _, uid, _ = _ucred.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size))
        if uid not in origin.owners and not _below(path, self._unix):
            raise self._not_theirs(path, origin, what)

    def connect_unix(self, sock: socket.socket, url: str, origin: Origin, what: str = "the hook") -> None:
        """Connect `sock` to a unix URL, judging both the file and who listens. Raises Forbidden, OSError.

        Our own user could connect to any file himself, so for him only who listens is judged: nothing is
        written before.
        """
        if origin.local:
            self.check(url, origin, what)
            sock.connect(urls.unix_path(url) or "")
            self.check_unix_peer(sock, url, origin, what)
            return
        with self.unix_target(url, origin, what) as target:
            sock.connect(target)
        self.check_unix_peer(sock, url, origin, what)

    def _open(self, path: str, origin: Origin, what: str) -> int:
        """A descriptor (O_PATH) of the socket at `path` if `origin` may use it. Raises Forbidden, OSError."""
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            info = os.fstat(descriptor)
            theirs = info.st_uid in origin.owners and not _led_astray(path, origin)
            if not stat.S_ISSOCK(info.st_mode) or not (theirs or self._allowed_file(path, descriptor)):
                raise self._not_theirs(path, origin, what)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _allowed_file(self, path: str, descriptor: int) -> bool:
        """Whether a rule allows the file, both as it is named and where it really is: who may write to an
        allowed folder may make links there.
        """
        if not _below(path, self._unix):
            return False
        real = os.readlink(f"/proc/self/fd/{descriptor}")
        return _below(real, tuple(os.path.realpath(prefix) for prefix in self._unix))

    def _not_theirs(self, path: str, origin: Origin, what: str) -> Forbidden:
        return Forbidden(
            f"{what} {printable(path)} is not a socket of {origin}; "
            f"an operator can allow it: --allow-hook {printable('unix:' + path)}"
        )


class Guard(NamedTuple):
    """A policy, and the one whose URLs it is to judge."""

    policy: Policy
    origin: Origin


# -- rules ------------------------------------------------------------------------------------------


def _tcp_rule(text: str) -> _Rule:
    match = _rule.fullmatch(text)
    if match is None or not match[1]:
        raise _bad_rule(text, "it must be HOST or CIDR, with or without :PORT; IPv6 stands in brackets")
    port = None if match[2] is None else _ANY_PORT if match[2] == "*" else int(match[2])
    if port is not None and match[2] != "*" and not 1 <= port <= 65535:
        raise _bad_rule(text, f"there is no port {port}")
    host = match[1]
    bracketed = host.startswith("[")
    if bracketed or "/" in host or ends_in_number(host):
        return _Rule(None, _network(text, host[1:-1] if bracketed else host, 6 if bracketed else 4), port)
    name = canonical_name(host)
    if name is None:
        raise _bad_rule(text, f"{printable(host)} is no host name; for an IPv6 address use brackets")
    return _Rule(name, None, port)


def _network(text: str, network: str, version: int) -> Network:
    try:
        parsed = IPv6Network(network) if version == 6 else IPv4Network(network)
    except ValueError as error:
        raise _bad_rule(text, str(error)) from None
    if isinstance(parsed, IPv6Network) and parsed.prefixlen >= 96 and parsed[0].ipv4_mapped is not None:
        raise _bad_rule(text, "write an IPv4-mapped network as IPv4")
    return parsed


def _unix_rule(text: str) -> str:
    path = text.removeprefix("unix:")
    if not path.startswith("/") or path.startswith("//"):
        raise _bad_rule(text, "it must be unix: and an absolute path, such as unix:/run/hooks")
    if not path.isprintable() or ".." in path.split("/"):
        raise _bad_rule(text, "the path must have no '..' and no control characters")
    return os.path.normpath(path)


def _bad_rule(text: str, why: str) -> ConfigError:
    return ConfigError(f"the rule {printable(text)!r} is not usable: {why}")


def _as_rule(name: str | None, address: IP, kind: str | None) -> str:
    """The narrowest rule that would have helped."""
    if name is not None and kind in _named_kinds:
        return name
    return f"[{address}]" if address.version == 6 else str(address)


# -- files ------------------------------------------------------------------------------------------


def _unix_path(url: str, what: str) -> str | None:
    """The path of a unix URL, None for an http or https one. Raises Forbidden for all others."""
    try:
        urls.check(url, what)
    except BadRequest as error:
        raise Forbidden(str(error)) from None
    path = urls.unix_path(url)
    if path is not None and ".." in path.split("/"):
        raise Forbidden(f"{what} has '..' in its path: {printable(path)}")
    return path


def _below(path: str, prefixes: tuple[str, ...]) -> bool:
    path = os.path.normpath(path)
    return any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)


def _led_astray(path: str, origin: Origin) -> bool:
    """Whether a link on the way, in a sticky folder such as /tmp, was laid by a third user: it could lead
    the answer to another socket of the requester's. Linux refuses these by itself where
    fs.protected_symlinks is set. Raises OSError.
    """
    at, sticky = "", False
    for name in path.split("/"):
        if not name:
            continue
        at = f"{at}/{name}"
        info = os.lstat(at)
        if stat.S_ISLNK(info.st_mode):
            if sticky and info.st_uid not in {0, os.getuid(), *origin.owners}:
                return True
            info = os.stat(at)
        sticky = bool(info.st_mode & stat.S_ISVTX)
    return False
