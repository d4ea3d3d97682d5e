"""Egress: where URLs may lead, by their text, by what DNS says, and by what is really connected to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import yarl
from ssrf_corpus import CASES, HTTP, OTHER, OWN, TOKEN, Case
from watching import NOBODY, Names, Wire, as_root, stranger, watched

from acomm import hosts
from acomm.egress import Address, Guard, Policy
from acomm.errors import Busy, ConfigError, Forbidden
from acomm.httpegress import PolicyResolver, connector, session
from acomm.origin import PROGRAM, Origin

BOTH_LOOPS = True


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


# -- the corpus -------------------------------------------------------------------------------------


def test_the_corpus_is_large_and_has_no_case_twice() -> None:
    assert len(set(CASES)) == len(CASES) >= 200
    assert sum(case.allowed for case in CASES) >= 80


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_text_of_a_url_decides_what_it_can(case: Case) -> None:
    policy = Policy(case.rules)
    if case.allowed or case.answers:
        policy.check(case.url, case.origin)
    else:
        with pytest.raises(Forbidden) as caught:
            policy.check(case.url, case.origin, "the task URL")
        text = str(caught.value)
        assert text.startswith("the task URL")
        assert text.isprintable()
        assert len(text) < 500


async def test_the_addresses_decide_the_rest(names: Names) -> None:
    for case in CASES:
        if not case.answers:
            continue
        names.answers = {_host(case.url): [case.answers]}
        if case.allowed:
            found = await Policy(case.rules).resolve(case.url, case.origin)
            assert tuple(address.host for address in found) == case.answers, case
        else:
            with pytest.raises(Forbidden):
                await Policy(case.rules).resolve(case.url, case.origin)


def _host(url: str) -> str:
    host = yarl.URL(url).raw_host
    assert host is not None
    return host.lower()


async def posted(case: Case, names: Names, *, judged: bool) -> Wire:
    """Post a case's URL as a channel does, or with no more than the session to stop it."""
    policy = Policy(case.rules)
    names.asked.clear()
    names.answers = {_host(case.url): [case.answers]} if case.answers else {}
    with watched(sealed=True) as wire:
        async with session(Guard(policy, case.origin), timeout=5) as client:
            with contextlib.suppress(Forbidden, aiohttp.ClientError, ValueError):
                if judged:
                    policy.check(case.url, case.origin)
                await client.post(case.url, data=b"x", allow_redirects=True)
    assert wire.lookups == [], case
    return wire


async def test_no_packet_leaves_for_a_forbidden_target(names: Names) -> None:
    """The whole corpus through a real client: what it tries to connect to, and what it asks DNS."""
    for case in CASES:
        if case.url.startswith("unix:"):
            continue
        wire = await posted(case, names, judged=True)
        tried = {host for host, _ in wire.connects}
        assert len(names.asked) == bool(case.answers), case
        if not case.allowed:
            assert not tried, case
        elif case.answers or ":" not in _host(case.url):
            # All of what was judged is tried, as all of it refuses, and nothing else.
            assert tried == set(case.answers or [_host(case.url)]), case


async def test_the_session_alone_goes_nowhere_forbidden(names: Names) -> None:
    """aiohttp reads some URLs more kindly than we do: then what it reads is what is judged."""
    for case in CASES:
        if case.allowed or case.url.startswith("unix:"):
            continue
        for host, port in (await posted(case, names, judged=False)).connects:
            where = f"[{host}]" if ":" in host else host
            Policy(case.rules).check(f"http://{where}:{port}/", case.origin)


def test_aiohttp_reads_the_same_host_out_of_what_passes() -> None:
    for case in CASES:
        try:
            Policy(("0.0.0.0/0:*", "[::/0]:*")).check(case.url, PROGRAM)
        except Forbidden:
            continue
        if case.url.startswith("unix:"):
            continue
        host, port = hosts.host_and_port(case.url, "the hook")
        theirs = yarl.URL(case.url)
        assert theirs.port == port
        assert theirs.user is None
        ours = hosts.spelled_address(host, "the hook")
        assert theirs.raw_host == (str(ours) if ours else host.lower()), case


# -- http at connect --------------------------------------------------------------------------------


class Server:
    """A local HTTP server: counts its connections and always says the same."""

    def __init__(self, reply: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") -> None:
        self.reply = reply
        self.connections = 0
        self.requests = 0
        self.port = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(length[0].split(b":")[1]) if length else 0)
                self.requests += 1
                writer.write(self.reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def at(self, host: str, port: int = 0) -> AsyncIterator[Server]:
        server = await asyncio.start_server(self, host, port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()


def redirect(status: int, to: str) -> Server:
    return Server(f"HTTP/1.1 {status} X\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode())


@pytest.fixture
async def allowed() -> AsyncIterator[Server]:
    async with Server().at("127.0.0.1") as server:
        yield server


@pytest.fixture
async def forbidden(allowed: Server) -> AsyncIterator[Server]:
    """At another address and the same port, as a rebinding name would lead to."""
    async with Server().at("127.0.0.2", allowed.port) as server:
        yield server
    assert server.connections == 0


async def test_a_message_reaches_an_allowed_address(allowed: Server, forbidden: Server) -> None:
    policy = Policy((f"127.0.0.1:{allowed.port}",))
    with watched() as wire:
        async with session(Guard(policy, OTHER), timeout=5) as client:
            async with client.post(f"http://127.0.0.1:{allowed.port}/", data=b"x") as reply:
                assert await reply.text() == "ok"
            with pytest.raises(Forbidden, match=r"127\.0\.0\.2 \(loopback\)"):
                await client.post(f"http://127.0.0.2:{allowed.port}/", data=b"x")
    assert wire.connects == [("127.0.0.1", allowed.port)]
    assert wire.lookups == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_does_not_lead_to_a_forbidden_address(status: int, forbidden: Server) -> None:
    target = f"http://127.0.0.2:{forbidden.port}/"
    async with redirect(status, target).at("127.0.0.1") as hook:
        policy = Policy((f"127.0.0.1:{hook.port}",))
        with watched() as wire:
            async with session(Guard(policy, OTHER), timeout=5) as client:
                url = f"http://127.0.0.1:{hook.port}/"
                async with client.post(url, data=b"x", allow_redirects=False) as reply:
                    assert reply.status == status
                with pytest.raises(Forbidden):
                    await client.post(url, data=b"x", allow_redirects=True)
        assert {host for host, _ in wire.connects} == {"127.0.0.1"}
        assert hook.requests == 2


async def test_a_name_that_rebinds_is_connected_to_where_it_was_judged(
    allowed: Server, forbidden: Server, names: Names
) -> None:
    names.answers["rebind.example"] = [("127.0.0.1",), ("127.0.0.2",)]
    policy = Policy((f"127.0.0.1:{allowed.port}",))
    url = f"http://rebind.example:{allowed.port}/"
    with watched() as wire:
        async with session(Guard(policy, OTHER), timeout=5) as client:
            async with client.post(url, data=b"x") as reply:
                assert await reply.text() == "ok"
        assert names.asked == ["rebind.example"]
        # The next session asks again, and does not go where the second answer leads.
        async with session(Guard(policy, OTHER), timeout=5) as client:
            with pytest.raises(Forbidden, match=r"rebind\.example at 127\.0\.0\.2"):
                await client.post(url, data=b"x")
    assert wire.connects == [("127.0.0.1", allowed.port)]
    assert wire.lookups == []


async def test_a_name_with_one_forbidden_address_is_not_tried_at_the_others(
    allowed: Server, forbidden: Server, names: Names
) -> None:
    names.answers["mixed.example"] = [("127.0.0.1", "127.0.0.2")]
    async with session(Guard(Policy((f"127.0.0.1:{allowed.port}",)), OTHER), timeout=5) as client:
        with pytest.raises(Forbidden):
            await client.post(f"http://mixed.example:{allowed.port}/", data=b"x")
    assert allowed.connections == 0


async def test_an_open_connection_is_lent_to_nobody_who_may_not_have_it(
    allowed: Server, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connector whose rules were narrowed would still have the connection in its pool."""
    url = f"http://127.0.0.1:{allowed.port}/"
    shared = connector(Policy(), OWN)
    async with aiohttp.ClientSession(connector=shared) as client:
        async with client.post(url, data=b"x") as reply:
            await reply.read()
        monkeypatch.setattr(shared, "_judge", (Policy(), OTHER, "the hook"))
        with pytest.raises(Forbidden):
            await client.post(url, data=b"x")
    assert allowed.requests == 1


async def test_the_environments_proxy_is_not_used(
    allowed: Server, forbidden: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.2:{forbidden.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    url = f"http://127.0.0.1:{allowed.port}/"
    async with session(Guard(Policy(), OWN), timeout=5) as client:
        async with client.post(url, data=b"x") as reply:
            assert await reply.text() == "ok"
    async with aiohttp.ClientSession(connector=connector(Policy(), OWN), trust_env=True) as client:
        with pytest.raises(Forbidden, match="through a proxy"):
            await client.post(url, data=b"x")


async def test_a_name_that_does_not_resolve_is_a_failure_and_no_refusal(names: Names) -> None:
    with pytest.raises(socket.gaierror):
        await Policy().resolve("http://missing.example/", OTHER)
    async with session(Guard(Policy(), OTHER), timeout=5) as client:
        with pytest.raises(aiohttp.ClientConnectorDNSError):
            await client.post("http://missing.example/", data=b"x")
    names.answers["nowhere.example"] = [()]
    with pytest.raises(OSError, match="no address"):
        await Policy().resolve("http://nowhere.example/", OTHER)


async def test_the_real_resolver_knows_the_loopback() -> None:
    found = await Policy().resolve("http://localhost:8080/", OWN)
    assert Address("127.0.0.1", 8080, socket.AF_INET) in found
    assert all(address.port == 8080 for address in found)
    resolved = await PolicyResolver(Policy(), OWN).resolve("localhost", 8080, socket.AF_INET)
    assert [(r["hostname"], r["host"], r["port"]) for r in resolved] == [("localhost", "127.0.0.1", 8080)]
    with pytest.raises(Forbidden):
        await PolicyResolver(Policy(), OTHER).resolve("localhost", 8080)


@pytest.mark.parametrize("host", ["metadata.google.internal", "a.localhost", "127.1", "127.0.0.1", "a..b"])
async def test_a_resolver_asks_dns_nothing_that_it_knows(host: str, names: Names) -> None:
    with pytest.raises(Forbidden):
        await PolicyResolver(Policy(), OTHER).resolve(host, 80)
    assert names.asked == []


async def test_an_address_resolves_to_itself_without_dns(names: Names) -> None:
    policy = Policy()
    assert await policy.resolve("https://8.8.8.8/", OTHER) == [Address("8.8.8.8", 443, socket.AF_INET)]
    found = await policy.resolve("http://[2001:4860:4860:0::8888]/", OTHER)
    assert found == [Address("2001:4860:4860::8888", 80, socket.AF_INET6)]
    assert names.asked == []


# -- unix -------------------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp: sticky, and everybody writes to it."""
    with tempfile.TemporaryDirectory(prefix="egress-", dir="/tmp") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@contextlib.contextmanager
def listening(path: Path, owner: int | None = None) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        sock.setblocking(False)
        if owner is not None:
            os.chown(path, owner, -1)
        yield sock


def connect(policy: Policy, path: Path, origin: Origin) -> socket.socket:
    """What a channel does."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        with policy.unix_target(f"unix://{path}", origin) as target:
            sock.connect(target)
        policy.check_unix_peer(sock, f"unix://{path}", origin)
    except BaseException:
        sock.close()
        raise
    return sock


def refused(policy: Policy, path: Path, origin: Origin) -> str:
    """The text of the refusal, which is the same at submission and at connect."""
    with pytest.raises(Forbidden) as caught:
        policy.admit(f"unix://{path}", origin)
    with pytest.raises(Forbidden) as again:
        connect(policy, path, origin)
    assert str(again.value) == str(caught.value)
    return str(caught.value)


def reaches(policy: Policy, path: Path, origin: Origin) -> bool:
    policy.admit(f"unix://{path}", origin)
    connect(policy, path, origin).close()
    return True


@pytest.mark.parametrize("origin", [OWN, TOKEN, PROGRAM], ids=str)
def test_our_own_sockets_are_for_us(shared: Path, origin: Origin) -> None:
    with listening(shared / "s"):
        assert reaches(Policy(), shared / "s", origin)


@pytest.mark.parametrize("origin", [OTHER, HTTP], ids=str)
def test_our_own_sockets_are_not_for_others(shared: Path, origin: Origin) -> None:
    with listening(shared / "s") as sock:
        refused(Policy(), shared / "s", origin)
        with pytest.raises(BlockingIOError):
            sock.accept()


def test_others_are_not_told_which_files_exist(shared: Path) -> None:
    path = shared / "s"
    with listening(path):
        there = refused(Policy(), path, OTHER)
    path.unlink()
    with pytest.raises(Forbidden) as missing:
        Policy().admit(f"unix://{path}", OTHER)
    path.touch()
    with pytest.raises(Forbidden) as no_socket:
        Policy().admit(f"unix://{path}", OTHER)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(Forbidden) as loop:
        Policy().admit(f"unix://{path}", OTHER)
    assert {str(refusal.value) for refusal in (missing, no_socket, loop)} == {there}


def test_a_socket_that_is_not_there_yet_passes_for_us_until_it_is_connected_to(shared: Path) -> None:
    policy, url = Policy(), f"unix://{shared}/s"
    policy.admit(url, OWN)
    with pytest.raises(FileNotFoundError):
        connect(policy, shared / "s", OWN)
    (shared / "f").touch()
    with pytest.raises(Forbidden, match="cannot be reached: Not a directory"):
        policy.admit(f"unix://{shared}/f/s", OWN)


@pytest.mark.parametrize("origin", [OWN, OTHER])
def test_a_want_of_descriptors_is_no_refusal_for_good(
    shared: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(Busy, match="the hook cannot be looked at now: Too many open files"):
        Policy().admit(f"unix://{shared}/s", origin)


def test_a_file_that_is_no_socket_is_nobodys(shared: Path) -> None:
    (shared / "f").touch()
    assert "not a socket of uid" in refused(Policy(), shared / "f", OWN)
    refused(Policy((f"unix:{shared}",)), shared / "f", OWN)
    refused(Policy(), shared, OWN)


@as_root
def test_a_socket_belongs_to_the_user_of_its_file(shared: Path) -> None:
    path = shared / "s"
    with stranger(path):
        assert reaches(Policy(), path, Origin.unix(NOBODY))
        assert f"--allow-hook unix:{path}" in refused(Policy(), path, OWN)
        refused(Policy(), path, OTHER)
        refused(Policy(), path, TOKEN)


@as_root
def test_a_rule_allows_the_sockets_of_others(shared: Path) -> None:
    path = shared / "s"
    with stranger(path):
        for rule in (f"unix:{path}", f"unix:{shared}", f"unix:{shared}/", "unix:/tmp", "unix:/"):
            assert reaches(Policy((rule,)), path, OTHER)
            assert reaches(Policy((rule,)), path, TOKEN)
            with pytest.raises(Forbidden, match="only with the token"):
                Policy((rule,)).admit(f"unix://{path}", HTTP)
        refused(Policy((f"unix:{shared}/other", f"unix:{shared.parent}/egress")), path, OTHER)


@as_root
def test_a_link_out_of_an_allowed_folder_is_not_followed(shared: Path) -> None:
    hooks, away = shared / "hooks", shared / "away"
    hooks.mkdir()
    away.mkdir()
    policy = Policy((f"unix:{hooks}",))
    (hooks / "s").symlink_to(away / "s")
    (shared / "linked").symlink_to(hooks)
    with listening(away / "s"), listening(hooks / "t"):
        refused(policy, hooks / "s", OTHER)
        assert reaches(policy, hooks / "t", OTHER)
        # The rule itself may go through a link of whoever wrote it.
        assert reaches(Policy((f"unix:{shared}/linked",)), shared / "linked" / "t", OTHER)


@as_root
def test_a_link_is_worth_what_it_leads_to(shared: Path) -> None:
    (shared / "link").symlink_to(shared / "s")
    os.lchown(shared / "link", NOBODY, -1)
    with listening(shared / "s"):
        refused(Policy(), shared / "link", Origin.unix(NOBODY))


@as_root
def test_a_strangers_link_in_a_sticky_folder_leads_nowhere(shared: Path) -> None:
    mine = shared / "mine"
    mine.mkdir()
    (shared / "link").symlink_to(mine / "s")
    (shared / "folder").symlink_to(mine)
    (mine / "link").symlink_to(mine / "s")
    for link in (shared / "link", shared / "folder", mine / "link"):
        os.lchown(link, OTHER.uid or 0, -1)
    with listening(mine / "s"):
        refused(Policy(), shared / "link", OWN)
        refused(Policy(), shared / "folder" / "s", OWN)
        assert reaches(Policy(), mine / "link", OWN)  # not sticky: who may write here may do worse
        (mine / "around").symlink_to(shared)  # a link of ours, to where the stranger's are
        refused(Policy(), mine / "around" / "link", OWN)
        for link in (shared / "link", shared / "folder"):
            os.lchown(link, os.getuid(), -1)
        assert reaches(Policy(), shared / "link", OWN)
        assert reaches(Policy(), shared / "folder" / "s", OWN)


def test_a_name_that_is_swapped_is_connected_to_where_it_was_judged(shared: Path) -> None:
    path, policy = shared / "s", Policy()
    with listening(path) as judged, socket.socket(socket.AF_UNIX) as sock:
        with policy.unix_target(f"unix://{path}", OWN) as target:
            path.unlink()
            with listening(path) as other:
                sock.connect(target)
                judged.accept()[0].close()
                with pytest.raises(BlockingIOError):
                    other.accept()


@as_root
def test_who_listens_counts_too(shared: Path) -> None:
    path, origin = shared / "s", Origin.unix(NOBODY)
    with listening(path, owner=NOBODY):
        Policy().admit(f"unix://{path}", origin)
        with pytest.raises(Forbidden, match="is not a socket of uid 65534"):
            connect(Policy(), path, origin)
        assert reaches(Policy((f"unix:{path}",)), path, origin)


def test_a_judged_socket_leaves_no_descriptor_behind(shared: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with listening(shared / "s"):
        before = descriptors()
        for _ in range(3):
            reaches(Policy(), shared / "s", OWN)
            refused(Policy(), shared / "s", OTHER)
        assert descriptors() == before


def test_each_kind_of_url_has_its_own_questions(shared: Path) -> None:
    with pytest.raises(ValueError, match="not a unix URL"):
        with Policy().unix_target("http://8.8.8.8/", OWN):
            pass
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ValueError, match="not a unix URL"):
        Policy().check_unix_peer(sock, "http://8.8.8.8/", OWN)


async def test_a_unix_url_has_no_addresses() -> None:
    with pytest.raises(Forbidden):
        await Policy().resolve("unix:///run/s", OWN)


# -- rules and origins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("", "HOST or CIDR"),
        (":80", "HOST or CIDR"),
        ("http://hooks.example", "HOST or CIDR"),
        ("hooks.example:80:80", "HOST or CIDR"),
        ("hooks.example:http", "HOST or CIDR"),
        ("hooks.example:", "HOST or CIDR"),
        ("hooks.example:0", "no port 0"),
        ("hooks.example:65536", "no port 65536"),
        ("*.example", "no host name"),
        ("*", "no host name"),
        (" hooks.example", "no host name"),
        ("hooks..example", "no host name"),
        ("bücher.example", "no host name"),
        ("user@hooks.example", "no host name"),
        ("10.0.0.1/8", "has host bits set"),
        ("10.0.0.0/33", "33"),
        ("hooks.example/8", "hooks.example"),
        ("127.1", "4 octets"),
        ("2130706433", "2130706433"),
        ("0177.0.0.1", "0177"),
        ("0x7f000001", "4 octets"),
        ("::1", "HOST or CIDR"),
        ("fd00::/8", "HOST or CIDR"),
        ("[fd00::]/8", "HOST or CIDR"),
        ("[fd00::1/8]", "has host bits set"),
        ("[10.0.0.1]", "3 parts"),
        ("[hooks.example]", "3 parts"),
        ("[]", "empty"),
        ("[::ffff:10.0.0.0/104]", "write an IPv4-mapped network as IPv4"),
        ("unix:", "absolute path"),
        ("unix:hooks", "absolute path"),
        ("unix:///run/hooks", "absolute path"),
        ("unix:/run/../etc", r"no '\.\.'"),
        ("unix:/run/\n", "no control characters"),
    ],
)
def test_a_rule_that_is_none_is_refused_at_once(rule: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Policy((rule,))
    assert str(caught.value).startswith("the rule '")
    assert str(caught.value).isprintable()


def test_rules_are_a_list_and_not_a_text() -> None:
    with pytest.raises(ConfigError, match="a list"):
        Policy("10.0.0.0/8")
    assert Policy(["10.0.0.0/8"]) == Policy(("10.0.0.0/8",))
    assert hash(Policy(["10.0.0.0/8"])) == hash(Policy(("10.0.0.0/8",)))
    assert Policy(["10.0.0.0/8"]) != Policy()
    assert repr(Policy(["a.example"])) == "Policy(allow=('a.example',))"
    with pytest.raises(AttributeError):
        Policy().allow = ()  # type: ignore[misc]


@pytest.mark.parametrize("case", [case for case in CASES if not case.answers and not case.rules], ids=repr)
def test_the_rule_that_a_refusal_names_helps(case: Case) -> None:
    try:
        Policy().check(case.url, case.origin)
    except Forbidden as error:
        _, found, rule = str(error).partition("--allow-hook ")
        if found and "metadata" not in case.url:
            try:
                Policy((rule,)).check(case.url, case.origin)
            except Forbidden as again:  # a name with two addresses may need two
                assert "--allow-hook" in str(again)
                assert rule not in str(again)


def test_origins() -> None:
    own = os.getuid()
    assert [o.local for o in (OWN, Origin.unix(0), PROGRAM)] == [True] * 3
    assert [o.local for o in (OTHER, HTTP, TOKEN)] == [False] * 3
    assert [o.owners for o in (OWN, PROGRAM, TOKEN)] == [{own}] * 3
    assert Origin.unix(0).owners == {0, own}
    assert OTHER.owners == {4242}
    assert HTTP.owners == set()
    assert [str(o) for o in (OTHER, HTTP, PROGRAM)] == ["uid 4242", "an HTTP peer", "this program"]


def test_it_costs_no_import_of_aiohttp() -> None:
    code = "import sys, acomm.egress; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
