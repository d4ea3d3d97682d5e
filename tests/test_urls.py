"""URLs: Go's url objects of any age in, Go's url objects out, strings between."""

import json
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acomm import urls
from acomm.errors import BadRequest

# Captured, WIRE.md section 2.
GO_1_19 = (
    '{"Scheme":"unix","Opaque":"","User":null,"Host":"","Path":"/run/t.sock","RawPath":"",'
    '"OmitHost":false,"ForceQuery":false,"RawQuery":"","Fragment":"","RawFragment":""}'
)
GO_1_27 = (
    '{"Scheme":"unix","Opaque":"","User":null,"Host":"","Path":"/run/t.sock","Fragment":"",'
    '"RawQuery":"","RawPath":"","RawFragment":"","ForceQuery":false,"OmitHost":false}'
)


def decode(value: Any) -> str | None:
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    return urls.decode(msgspec.Raw(text if isinstance(text, bytes) else text.encode()), "hook")


@pytest.mark.parametrize(
    ("value", "url"),
    [
        (GO_1_19, "unix:///run/t.sock"),
        (GO_1_27, "unix:///run/t.sock"),
        ({"Scheme": "unix", "Path": "/p.sock"}, "unix:///p.sock"),
        ({"scheme": "unix", "PATH": "/p.sock"}, "unix:///p.sock"),
        ({"Scheme": "UNIX", "Path": "/p.sock"}, "unix:///p.sock"),
        ({"Scheme": "unix", "Opaque": "/p.sock"}, "unix:///p.sock"),
        ({"Scheme": "unix", "Opaque": "/o.sock", "Path": "/p.sock"}, "unix:///o.sock"),
        ({"Scheme": "unix", "Path": "/p.sock", "RawQuery": "a=1"}, "unix:///p.sock?a=1"),
        ({"Scheme": "unix", "Path": "/p.sock", "ForceQuery": True}, "unix:///p.sock?"),
        ({"Scheme": "http", "Host": "h", "Path": "/p", "ForceQuery": True}, "http://h/p?"),
        ({"Scheme": "http", "Host": "h", "Path": "/p", "RawQuery": "a", "ForceQuery": True}, "http://h/p?a"),
        ({"Scheme": "unix", "Path": "/with space.sock"}, "unix:///with space.sock"),
        ({"Scheme": "unix", "Path": "/a/b", "RawPath": "/a%2Fb"}, "unix:///a%2Fb"),
        ({"Scheme": "unix", "Path": "/é#.sock"}, "unix:///é#.sock"),
        (
            {"Scheme": "unix", "Path": "/p.sock", "Host": "ignored", "OmitHost": True, "User": {}},
            "unix:///p.sock",
        ),
        ({"Scheme": "unix", "Path": "/p.sock", "Surprise": [1], "User": None}, "unix:///p.sock"),
        ({"Scheme": "unix", "Path": "/p.sock", "RawQuery": None}, "unix:///p.sock"),
        (
            {
                "Scheme": "http",
                "User": {},
                "Host": "example.com:8080",
                "Path": "/a/b/c",
                "RawPath": "/a%2Fb/c",
                "RawQuery": "x=1&y=%20#frag",
            },
            "http://example.com:8080/a%2Fb/c?x=1&y=%20#frag",
        ),
        ({"Scheme": "http", "Host": "h", "Path": "/a b/é"}, "http://h/a%20b/%C3%A9"),
        (
            {
                "Scheme": "http",
                "Host": "localhost:18510",
                "Path": "/stream",
                "RawQuery": "addr=unix%3A%2F%2F",
            },
            "http://localhost:18510/stream?addr=unix%3A%2F%2F",
        ),
        ({"Scheme": "https", "Host": "[::1]:8"}, "https://[::1]:8"),
        ('"unix:///run/t.sock"', "unix:///run/t.sock"),
        ('"http://h/p?q"', "http://h/p?q"),
        ("null", None),
        ('""', None),
    ],
)
def test_what_peers_send_is_understood(value: Any, url: str | None) -> None:
    assert decode(value) == url


def test_nothing_is_no_url() -> None:
    assert urls.decode(None, "hook") is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"Scheme": "unix", "Path": "/p", "User": "x"}, "User must be dict, not str"),
        ({"Scheme": "unix", "Path": 5}, "Path must be str, not int"),
        ({"Scheme": "unix", "Path": "/p", "OmitHost": 1}, "OmitHost must be bool"),
        ({"Scheme": "tcp", "Host": "h:1"}, "unknown scheme"),
        ({"Scheme": "unix"}, "absolute socket path"),
        ({}, "unknown scheme"),
        ({"Scheme": "http", "Path": "/p"}, "no host"),
        ({"Scheme": "http", "Opaque": "opaque"}, "no host"),
        ({"Scheme": "http", "Host": "h:99999"}, "not a URL"),
        ({"Scheme": "http", "Host": "[::1"}, "not a URL"),
        ({"Scheme": "http", "Host": "u:p@h"}, "credentials"),
        ('"unix://relative.sock"', "absolute socket path"),
        ('"UNIX:///p.sock"', "must be unix:// and an absolute socket path"),
        ('"unix:/p.sock"', "must be unix:// and an absolute socket path"),
        ('"file:///etc/passwd"', "unknown scheme"),
        ('"not a url"', "unknown scheme"),
        (b'"unix:///a\\u0000b"', "control characters"),
        (b'"http://h/\\r\\nX: y"', "control characters"),
        ({"Scheme": "unix", "Path": "/" + "x" * 107}, "longer than 107 bytes"),
        ({"Scheme": "unix", "Path": "/" + "é" * 54}, "longer than 107 bytes"),
        ({"Scheme": "http", "Host": "h", "RawQuery": "x" * 8192}, "longer than 8192"),
        ('"' + "x" * 60_000 + '"', "longer than"),
        ("5", "must be a URL object, not int"),
        ("[]", "must be a URL object, not list"),
        ("true", "must be a URL object"),
        (b'"\\ud800"', "truncated"),
        ("1e999", "out of range"),
    ],
)
def test_what_nothing_can_be_sent_to_is_refused(value: Any, reason: str) -> None:
    for _ in range(2):  # a cache must not turn a refusal into anything else
        with pytest.raises(BadRequest, match=reason) as caught:
            decode(value)
        assert str(caught.value).startswith("hook")


def test_a_path_of_exactly_the_kernels_limit_passes() -> None:
    path = "/" + "x" * 106
    assert decode({"Scheme": "unix", "Path": path}) == "unix://" + path


def test_a_plain_path_is_written_as_go_1_19_writes_it() -> None:
    assert urls.encode("unix:///run/t.sock").decode() == GO_1_19
    assert urls.encode(None) == b"null"


@pytest.mark.parametrize("name", ["with space", "é", "a#b", "a?b", "100%", "a%20b", "<x>", 'q"q', "a\\b"])
def test_a_path_that_go_would_escape_goes_where_go_leaves_it_alone(name: str) -> None:
    members = json.loads(urls.encode(f"unix:///run/{name}"))
    assert (members["Opaque"], members["Path"]) == (f"/run/{name}", "")


def test_an_http_url_is_split_as_go_splits_it() -> None:
    members = json.loads(urls.encode("http://example.com:8080/a%2Fb/c%20d?x=1&y=%20"))
    assert members == {
        **json.loads(GO_1_19),
        "Scheme": "http",
        "Host": "example.com:8080",
        "Path": "/a/b/c d",
        "RawPath": "/a%2Fb/c%20d",
        "RawQuery": "x=1&y=%20",
    }
    assert json.loads(urls.encode("http://h/c%20d"))["RawPath"] == ""  # what Go makes of Path by itself


@pytest.mark.parametrize(
    ("url", "query", "forced", "again"),
    [
        ("http://h/p?", "", True, "http://h/p?"),
        ("http://h?", "", True, "http://h?"),
        ("http://h/p??", "?", False, "http://h/p??"),
        ("http://h/p?#", "", True, "http://h/p?"),
        ("http://h/p?#a?", "", True, "http://h/p?"),
        ("http://h/p#?", "", False, "http://h/p"),
        ("http://h/p#a?b", "", False, "http://h/p"),
        ("http://h/p?a#b?", "a", False, "http://h/p?a"),
    ],
)
def test_an_empty_query_travels_and_a_fragment_does_not(
    url: str, query: str, forced: bool, again: str
) -> None:
    members = json.loads(urls.encode(url))
    assert (members["RawQuery"], members["ForceQuery"], members["Fragment"]) == (query, forced, "")
    assert decode(members) == again


printable_text = st.text(
    st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=30
)


@given(printable_text)
def test_any_socket_path_comes_back(name: str) -> None:
    url = urls.unix_url("/" + name)
    try:
        urls.check(url, "url")
    except BadRequest:
        assert len(name.encode()) > 106
        return
    assert decode(urls.encode(url)) == url


@given(printable_text, st.text("abc/%2F=&+ é", max_size=20))
def test_http_urls_come_back_meaning_the_same(path: str, query: str) -> None:
    url = f"http://example.com:80/{path.replace('#', '').replace('?', '')}?{query}"
    try:
        again = decode(urls.encode(url))
    except BadRequest:
        return
    assert again is not None
    before, after = urlsplit(url), urlsplit(again)
    assert (after.netloc, after.query) == (before.netloc, before.query)
    assert urls.encode(again) == urls.encode(url)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([*urls._empty, "scheme", "PATH", "x"]), json_values, max_size=11)
    | json_values
    | st.binary(max_size=40)
)
def test_a_stranger_can_cause_nothing_but_a_refusal(value: Any) -> None:
    try:
        url = decode(value if isinstance(value, bytes) else json.dumps(value).encode("utf-8"))
    except BadRequest:
        return
    if url is not None:
        urls.check(url, "what was accepted")


def test_large_urls_of_strangers_are_not_kept() -> None:
    before = urls._decode_cached.cache_info().currsize
    for number in range(20):
        decode({"Scheme": "http", "Host": "h", "Path": f"/{number}" + "x" * 2000})
    assert urls._decode_cached.cache_info().currsize == before


def test_a_hook_without_a_host_is_one_only_where_the_senders_address_is_known() -> None:
    raw = msgspec.Raw(b'{"Scheme":"http","Host":":4080","Path":"/response"}')
    with pytest.raises(BadRequest, match="the hook has no host"):
        urls.decode(raw, "the hook")
    assert urls.decode(raw, "the hook", "10.0.0.1") == "http://10.0.0.1:4080/response"
    assert urls.decode(raw, "the hook", "fe80::1") == "http://[fe80::1]:4080/response"
    with pytest.raises(BadRequest, match="the hook has no host"):
        urls.decode(raw, "the hook")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("unix:///a?b@c", "unix:///a?b@c"),
        ("http://host/a/b", "http://host/a/b"),
        ("http://user:pass@host:1/a@b#c", "http://host:1/a@b"),
        ("https://host/?key=secret&flag", "https://host/?key=...&flag=..."),
        ("https://host?key=a?b#c", "https://host?key=..."),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert urls.redacted(url) == shown
