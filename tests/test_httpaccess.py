"""Who may use the HTTP door: addresses, hosts, origins, and the token's file."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acomm.errors import AddressInUse
from workers.errors import ConfigError
from workers.httpaccess import Address, Hosts, Token, check_public_url, is_address, is_loopback, listen

as_root = pytest.mark.skipif(os.getuid() != 0, reason="gives files away")

GOOD = "0123456789abcdef0123456789ABCDEF"


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("127.0.0.1:8080", "127.0.0.1", 8080),
            ("localhost:0", "localhost", 0),
            ("0.0.0.0:80", "0.0.0.0", 80),
            ("[::1]:8080", "::1", 8080),
            ("[::]:1", "::", 1),
        ],
    )
    def test_what_is_one(self, text: str, host: str, port: int) -> None:
        address = Address.parse(text)
        assert address == (host, port)
        assert address.url() == f"http://{text}"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "HOST:PORT"),
            ("8080", "HOST:PORT"),
            ("localhost", "HOST:PORT"),
            ("::1:8080", "HOST:PORT"),
            ("[::1]", "HOST:PORT"),
            ("http://localhost:80", "HOST:PORT"),
            ("localhost:80/", "HOST:PORT"),
            ("localhost:٨٠", "HOST:PORT"),
            ("localhost:-1", "HOST:PORT"),
            (":8080", "needs a host"),
            ("[]:8080", "needs a host"),
            ("localhost:65536", "65535"),
            ("a\nb:1", r"a\\nb"),
        ],
    )
    def test_what_is_none(self, text: str, said: str) -> None:
        with pytest.raises(ConfigError, match=said) as info:
            Address.parse(text)
        assert "\n" not in str(info.value)

    def test_a_name_is_resolved_and_the_older_protocol_preferred(self) -> None:
        assert Address("localhost", 5).resolve() == (socket.AF_INET, ("127.0.0.1", 5))
        assert Address("::1", 5).resolve() == (socket.AF_INET6, ("::1", 5))

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 70, "a..b"])
    def test_a_name_that_nobody_has(self, host: str) -> None:
        with pytest.raises(ConfigError, match="cannot find the host"):
            Address(host, 5).resolve()

    @pytest.mark.parametrize(
        ("address", "loopback"),
        [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)],
    )
    def test_loopback(self, address: str, loopback: bool) -> None:
        assert is_loopback(address) is loopback


class TestListen:
    def test_a_port_that_is_taken(self) -> None:
        with listen(socket.AF_INET, ("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
            with pytest.raises(
                AddressInUse, match=f"cannot listen at http://127.0.0.1:{port}: the port is in"
            ):
                listen(socket.AF_INET, ("127.0.0.1", port))

    def test_an_address_that_is_not_ours(self) -> None:
        with pytest.raises(ConfigError, match=r"cannot listen at http://192\.0\.2\.1:0"):
            listen(socket.AF_INET, ("192.0.2.1", 0))

    def test_what_is_accepted_gives_up_on_those_who_take_nothing(self) -> None:
        with listen(socket.AF_INET, ("127.0.0.1", 0)) as sock:
            sock.setblocking(True)
            with socket.create_connection(sock.getsockname()), sock.accept()[0] as accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


class TestHosts:
    hosts = Hosts("10.1.2.3", ["api.example.org", "other.example.org:444"], "https://Public.example.org/x")

    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "LOCALHOST:1234",
            "localhost.:80",
            "127.0.0.1:8080",
            "[::1]:8080",
            "10.1.2.3",
            "10.1.2.3:99",
            "api.example.org",
            "Api.Example.org:8443",
            "other.example.org:444",
            "public.example.org",
        ],
    )
    def test_ours(self, host: str) -> None:
        assert self.hosts.allows(host)

    @pytest.mark.parametrize(
        "host",
        [
            None,
            "",
            "evil.example.org",
            "localhost.evil.org",
            "evil-localhost",
            "localhost@evil.org",
            "localhost:",
            "localhost:80:80",
            "localhost, evil.org",
            "localhost/",
            " localhost",
            "other.example.org",
            "other.example.org:445",
            "127.0.0.1.evil.org",
            "192.168.0.1",
            "[::2]",
            "x.api.example.org",
            "loc\u0430lhost",
        ],
    )
    def test_not_ours(self, host: str | None) -> None:
        assert not self.hosts.allows(host)

    @pytest.mark.parametrize(
        ("host", "address", "same"),
        [
            ("192.168.0.7:8080", "192.168.0.7", True),
            ("[fe80::1]:8080", "fe80::1", True),
            ("192.168.0.8", "192.168.0.7", False),
            (None, "192.168.0.7", False),
        ],
    )
    def test_the_address_that_the_connection_came_in_at(
        self, host: str | None, address: str, same: bool
    ) -> None:
        assert is_address(host, address) is same

    @pytest.mark.parametrize("name", ["", "http://x", "a b", "x:y", "*", "x:123456", "a,b"])
    def test_names_that_are_none(self, name: str) -> None:
        with pytest.raises(ConfigError, match="http_host must be NAME"):
            Hosts("127.0.0.1", [name])

    @pytest.mark.parametrize(
        ("origin", "same"),
        [
            ("http://localhost:8080", True),
            ("https://LOCALHOST:8080", True),
            ("http://localhost", False),
            ("http://localhost:3000", False),
            ("null", False),
            ("", False),
            ("ftp://localhost:8080", False),
            ("http://localhost:8080/", False),
            ("http://localhost:8080.evil.org", False),
        ],
    )
    def test_origins(self, origin: str, same: bool) -> None:
        assert Hosts.same_origin(origin, "localhost:8080") is same


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("unix:///x", "an http or https URL"),
        ("ftp://x", "unknown scheme"),
        ("http://", "no host"),
        ("http://u:p@x", "credentials"),
        ("https://x?a=1", "without a query"),
        ("https://x#a", "without a query"),
        ("https://x/?", "without a query"),
        ("https://x/#", "without a query"),
    ],
)
def test_public_urls_that_are_none(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_public_url(url)


@given(st.text(max_size=30) | st.text("htps:/[]@.?#x1%", max_size=30).map("http://{}".format))
def test_whatever_is_given_as_a_setting_is_taken_or_refused_in_one_line(text: str) -> None:
    for read in (Address.parse, check_public_url, lambda text: Hosts("127.0.0.1", [text], None)):
        try:
            read(text)
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 600


# aiohttp gives headers like this.
headers = st.binary(max_size=30).map(lambda data: data.decode("utf-8", "surrogateescape"))
like_ours = st.text("localhst.:@[]/ 8\u0130\u212a\uff0e\u2024", max_size=14)


@given(headers | like_ours)
def test_no_header_passes_but_by_our_names(text: str) -> None:
    hosts = Hosts("10.1.2.3")
    names = {"localhost", "127.0.0.1", "[::1]", "10.1.2.3"}
    bare = re.sub(r"[.]*(:[0-9]{1,5})?\Z", "", text.lower()) if text.isascii() else text
    assert hosts.allows(text) <= (bare in names)
    assert is_address(text, "10.1.2.3") <= (bare == "10.1.2.3")
    assert not Hosts.same_origin(text, "localhost") or text.lower() in (
        "http://localhost",
        "https://localhost",
    )
    assert not Token(GOOD).fits(text)
    assert not Token(GOOD).fits(f"Bearer {text}")


def test_a_public_url_has_no_slash_at_its_end() -> None:
    assert check_public_url("https://x.org/acomm/") == "https://x.org/acomm"


class TestToken:
    def test_a_missing_one_is_made_for_us_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "token"
        umask = os.umask(0)
        try:
            token = Token.load(str(path))
        finally:
            os.umask(umask)
        assert path.stat().st_mode & 0o7777 == 0o600
        assert path.parent.stat().st_mode & 0o7777 == 0o700
        text = path.read_text()
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", text)
        assert os.listdir(path.parent) == ["token"]
        assert token.fits(f"Bearer {text.strip()}")
        assert text.strip() not in repr(token) + str(vars(Token))

    def test_no_two_are_the_same_and_one_stays(self, tmp_path: Path) -> None:
        paths = [tmp_path / "a", tmp_path / "b"]
        texts = []
        for path in (*paths, *paths):
            Token.load(str(path))
            texts.append(path.read_text())
        assert texts[:2] == texts[2:]
        assert texts[0] != texts[1]

    @pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
    def test_one_of_the_users_own(self, tmp_path: Path, ending: str) -> None:
        path = written(tmp_path / "token", GOOD + ending)
        token = Token.load(path)
        assert token.fits(f"Bearer {GOOD}")
        assert token.fits(f"bearer  {GOOD} ")

    @pytest.mark.parametrize(
        "header",
        [
            None,
            "",
            GOOD,
            "Bearer",
            "Bearer ",
            f"Basic {GOOD}",
            f"Bearer {GOOD}x",
            f"Bearer {GOOD[:-1]}",
            f"Bearer {GOOD.lower()}",
            f"Bearer {GOOD} {GOOD}",
            "Bearer \udcff\u00e9",
        ],
    )
    def test_what_does_not_fit(self, header: str | None) -> None:
        assert not Token(GOOD).fits(header)

    @pytest.mark.parametrize(
        "content",
        ["", "\n", "short", GOOD[:-1], f"{GOOD}\n\n", f"{GOOD}\n{GOOD}", f"{GOOD} x", f"{GOOD}é", "a" * 5000],
    )
    def test_files_that_hold_none(self, tmp_path: Path, content: str) -> None:
        path = written(tmp_path / "token", content)
        with pytest.raises(ConfigError, match="must hold one line of 32 or more") as info:
            Token.load(path)
        assert content.strip() == "" or content.strip() not in str(info.value)

    @pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o602, 0o644, 0o601])
    def test_files_that_others_can_use(self, tmp_path: Path, mode: int) -> None:
        path = written(tmp_path / "token", GOOD)
        os.chmod(path, mode)
        with pytest.raises(ConfigError, match=f"others can use .* \\(mode {mode:o}\\): chmod it to 600"):
            Token.load(path)

    @as_root
    def test_files_of_others(self, tmp_path: Path) -> None:
        path = written(tmp_path / "token", GOOD)
        os.chown(path, 1234, -1)
        with pytest.raises(ConfigError, match="belongs to uid 1234"):
            Token.load(path)

    @pytest.mark.parametrize("kind", ["folder", "fifo", "dangling"])
    def test_what_is_no_file(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "token"
        if kind == "folder":
            path.mkdir(0o700)
        elif kind == "fifo":
            os.mkfifo(path, 0o600)
        else:
            path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match="token file"):
            Token.load(str(path))

    def test_a_link_is_followed_as_secrets_are_often_mounted_so(self, tmp_path: Path) -> None:
        written(tmp_path / "real", GOOD)
        (tmp_path / "token").symlink_to(tmp_path / "real")
        assert Token.load(str(tmp_path / "token")).fits(f"Bearer {GOOD}")

    def test_a_folder_in_which_others_could_swap_it(self, tmp_path: Path) -> None:
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        with pytest.raises(ConfigError, match="others can write to the folder"):
            Token.load(str(tmp_path / "open" / "token"))


def written(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)
