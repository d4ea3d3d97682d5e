"""Where requests try to make a service go, and whether they may: data for test_egress.

A case names who asks (`origin`), what the operator allowed (`rules`) and, for a name, what DNS `answers`.
Without answers the text of the URL decides; with them it passes at submission, and the addresses decide.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from acomm.origin import PROGRAM, Origin

OWN = Origin.unix(os.getuid())
ROOT = Origin.unix(0)
OTHER = Origin.unix(4242)
HTTP = Origin.http()
TOKEN = Origin.http(trusted=True)

LOCAL = tuple(dict.fromkeys((OWN, ROOT, PROGRAM)))  # root may run the tests
FOREIGN = (OTHER, HTTP, TOKEN)
EVERYBODY = LOCAL + FOREIGN


class Case(NamedTuple):
    url: str
    origin: Origin
    allowed: bool
    why: str
    rules: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def __repr__(self) -> str:
        rules = f" with {', '.join(self.rules)}" if self.rules else ""
        answers = f" at {', '.join(self.answers)}" if self.answers else ""
        verdict = "may" if self.allowed else "may not"
        return f"{self.origin} {verdict} {self.url!r}{answers}{rules}: {self.why}"


CASES: list[Case] = []


def _cases(
    allowed: bool,
    why: str,
    *urls: str,
    origins: tuple[Origin, ...] = (OTHER,),
    rules: tuple[str, ...] = (),
    answers: tuple[str, ...] = (),
) -> None:
    CASES.extend(Case(url, origin, allowed, why, rules, answers) for url in urls for origin in origins)


def _allow(
    why: str,
    *urls: str,
    origins: tuple[Origin, ...] = (OTHER,),
    rules: tuple[str, ...] = (),
    answers: tuple[str, ...] = (),
) -> None:
    _cases(True, why, *urls, origins=origins, rules=rules, answers=answers)


def _deny(
    why: str,
    *urls: str,
    origins: tuple[Origin, ...] = (OTHER,),
    rules: tuple[str, ...] = (),
    answers: tuple[str, ...] = (),
) -> None:
    _cases(False, why, *urls, origins=origins, rules=rules, answers=answers)


# -- the public internet ----------------------------------------------------------------------------

_allow(
    "a public address",
    "http://93.184.216.34/hook",
    "https://93.184.216.34",
    "http://93.184.216.34:8080/a?b=c#d",
    "http://[2606:2800:220:1:248:1893:25c8:1946]/",
    "https://[2001:4860:4860::8888]:8443/",
    "http://1.1.1.1?x",
    "http://[::ffff:8.8.8.8]/",
    "http://[64:ff9b::8.8.8.8]/",
)
_allow("a public address", "http://93.184.216.34/", origins=EVERYBODY)
_allow(
    "a public name",
    "http://hooks.example/a",
    "HTTPS://HOOKS.EXAMPLE:8443/a",
    "http://hooks.example./",
    "http://under_score.example/",
    "http://xn--bcher-kva.example/",
    "http://a-b.c-d.example:1024/",
    "http://hooks.example:65535/?next=http://127.0.0.1/",
    "http://hooks.example/@127.0.0.1/",
    "http://hooks.example#@127.0.0.1/",
    "http://127.0.0.1.example/",
    "http://0x7f.example/",
    answers=("93.184.216.34",),
)
_allow("all of a name's addresses are public", "http://two.example/", answers=("8.8.8.8", "2001:4860::1"))
_allow("private networks begin and end where they do", "http://172.15.255.255/", "http://172.32.0.0/")
_allow("and so do the others", "http://9.255.255.255/", "http://11.0.0.0/", "http://100.63.255.255/")
_allow("and so do these", "http://100.128.0.0/", "http://169.253.255.255/", "http://223.255.255.255/")
_allow("the neighbours of Azure's", "http://168.63.129.15/", "http://168.63.129.17/")

# -- loopback ---------------------------------------------------------------------------------------

_LOOPBACK = (
    "http://127.0.0.1/",
    "http://127.0.0.1:8080/",
    "https://127.255.255.254/",
    "http://127.1.2.3:3000/",
    "http://[::1]:8080/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::FFFF:7F00:1]/",
    "http://[0:0:0:0:0:ffff:127.0.0.1]/",
)
_deny("the loopback is not for others", *_LOOPBACK)
_deny("nor for HTTP peers, token or not", *_LOOPBACK[:2], "http://[::1]/", origins=(HTTP, TOKEN))
_allow("the loopback is for our own user", *_LOOPBACK, origins=(OWN,))
_allow("and for root, and for the program", *_LOOPBACK[:2], "http://[::1]/", origins=(ROOT, PROGRAM))

_LOCALHOST = (
    "http://localhost/",
    "http://LocalHost:8080/",
    "http://localhost./",
    "http://a.localhost/",
    "http://a.b.LOCALHOST./",
    "http://localhost.localdomain/",
    "http://localhost6/",
    "http://ip6-localhost:8080/",
    "http://ip6-loopback/",
)
_deny("names of the loopback are known without DNS", *_LOCALHOST)
_deny("for HTTP peers, too", "http://localhost:18510/stream", origins=(HTTP, TOKEN))
_allow("our own user may name it", *_LOCALHOST, origins=(OWN,), answers=("127.0.0.1", "::1"))
_allow("root and the program, too", "http://localhost:8123/", origins=LOCAL, answers=("127.0.0.1",))
_deny("localhost must be the loopback", "http://localhost/", origins=LOCAL, answers=("10.0.0.1",))
_deny("all of it", "http://localhost/", origins=LOCAL, answers=("127.0.0.1", "192.168.0.1"))

# -- disguised numbers ------------------------------------------------------------------------------

_DISGUISED = (
    "http://2130706433/",
    "http://2130706433:8080/",
    "http://017700000001/",
    "http://0x7f000001/",
    "http://0X7F000001/",
    "http://0x7f.0x0.0x0.0x1/",
    "http://0x7f.1/",
    "http://0177.0.0.1/",
    "http://0177.0.0.01/",
    "http://00000177.0.0.1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.1./",
    "http://127.0.0.01/",
    "http://127.000.000.001/",
    "http://0/",
    "http://00/",
    "http://0x0/",
    "http://0x/",
    "http://0./",
    "http://127.0.0.256/",
    "http://127.0.0.1.1/",
    "http://127.0.0.-1/",
    "http://4294967295/",
    "http://4294967296/",
    "http://2852039166/",
    "http://0xA9FEA9FE/",
    "http://0251.0376.0251.0376/",
    "http://169.16689662/",
    "http://169.254.43518/",
    "http://0xa9.254.169.254/",
    "http://3232235521/",
    "http://10.1/",
    "http://012.0.0.1/",
    "http://example.1/",
    "http://example.0x7f/",
)
_deny("a number in disguise", *_DISGUISED)
_deny("in disguise it is nobody's", *_DISGUISED[:6], "http://127.1/", "http://0/", origins=(OWN, HTTP))
_deny("not even where the address is public", "http://134744072/", "http://8.8.2056/", "http://010.8.8.8/")
_deny("nor where it is allowed", "http://2130706433/", "http://127.1/", rules=("127.0.0.0/8",))
_deny(
    "letters beyond ASCII, which some parsers turn into digits and dots",
    "http://１２７.0.0.1/",
    "http://127。0。0。1/",
    "http://127．0．0．1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://١٢٧.0.0.1/",
    "http://loca\u017fhost/",
    "http://ⓛocalhost/",
    "http://localho\u00adst/",
    "http://bücher.example/",
    "http://[::１]/",
    "http://127.0.0.1:８０/",
    "http://𝟏𝟐𝟕.𝟎.𝟎.𝟏/",
)
_deny("the same for our own user", "http://１２７.0.0.1/", "http://127。0。0。1/", origins=LOCAL)
_deny(
    "percent signs in the host",
    "http://%31%32%37.0.0.1/",
    "http://127%2e0%2e0%2e1/",
    "http://%6c%6f%63alhost/",
    "http://hooks.example%00.evil.example/",
    "http://%5B::1%5D/",
    "http://hooks.example%2f@127.0.0.1/",
    "http://[::1%25lo]/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
)
_deny("a zone is nobody's", "http://[::1%25lo]/", "http://[fe80::1%25eth0]/", origins=(OWN,))

# -- other special addresses ------------------------------------------------------------------------

_SPECIAL = {
    "unspecified": ("http://0.0.0.0/", "http://0.0.0.0:8080/", "http://0.1.2.3/", "http://[::]/"),
    "unspecified in IPv6": ("http://[0:0:0:0:0:0:0:0]/", "http://[::ffff:0.0.0.0]/", "http://[::0.0.0.0]/"),
    "private": ("http://10.0.0.1/", "http://10.255.255.255/", "http://172.16.0.1/", "http://172.31.255.255/"),
    "also private": ("http://192.168.0.1:8080/", "http://192.168.255.255/", "http://[::ffff:10.0.0.1]/"),
    "private in IPv6": ("http://[fc00::1]/", "http://[fd12:3456:789a::1]/", "http://[fec0::1]/"),
    "shared by carriers": ("http://100.64.0.1/", "http://100.127.255.254/", "http://[::ffff:6440:1]/"),
    "link-local": (
        "http://169.254.0.1/",
        "http://169.254.255.255/",
        "http://[fe80::1]/",
        "http://[febf::1]/",
    ),
    "metadata": (
        "http://169.254.169.254/latest/meta-data/",
        "http://169.254.169.254:80/computeMetadata/v1/",
        "http://169.254.170.2/v2/credentials",
        "http://100.100.100.200/latest/meta-data/",
        "http://192.0.0.192/opc/v1/",
        "http://168.63.129.16/machine?comp=goalstate",
        "http://[fd00:ec2::254]/latest/",
        "http://[fd20:ce::254]/",
        "http://[fe80::a9fe:a9fe]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[::ffff:a9fe:a9fe]/",
    ),
    "metadata by name": (
        "http://metadata.google.internal/computeMetadata/v1/",
        "http://METADATA.google.internal./",
        "http://metadata.goog/",
        "http://metadata/",
        "http://instance-data/latest/",
        "http://instance-data.ec2.internal/",
        "http://metadata.azure.internal/",
    ),
    "multicast": ("http://224.0.0.1/", "http://239.255.255.250:1900/", "http://[ff02::1]/"),
    "broadcast": ("http://255.255.255.255/", "http://[::ffff:255.255.255.255]/"),
    "benchmarking": ("http://198.18.0.1/", "http://198.19.255.255/", "http://[2001:2::1]/"),
    "documentation": ("http://192.0.2.1/", "http://198.51.100.1/", "http://203.0.113.1/"),
    "documentation in IPv6": ("http://[2001:db8::1]/", "http://[3fff::1]/"),
    "reserved": ("http://240.0.0.1/", "http://192.0.0.1/", "http://192.88.99.1/"),
    "reserved in IPv6": (
        "http://[100::1]/",
        "http://[5f00::1]/",
        "http://[4000::1]/",
        "http://[2001:10::1]/",
    ),
    "compatible, long dead": ("http://[::127.0.0.1]/", "http://[::7f00:1]/", "http://[::8.8.8.8]/"),
    "6to4": ("http://[2002:7f00:1::]/", "http://[2002:a9fe:a9fe::1]/", "http://[2002:808:808::1]/"),
    "Teredo": ("http://[2001::1]/", "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/"),
    "NAT64": ("http://[64:ff9b::127.0.0.1]/", "http://[64:ff9b::a9fe:a9fe]/", "http://[64:ff9b::10.0.0.1]/"),
    "local NAT64": ("http://[64:ff9b:1::8.8.8.8]/", "http://[64:ff9b:0:1::8.8.8.8]/"),
    "ISATAP": ("http://[2606:2800::5efe:127.0.0.1]/", "http://[2606:2800::200:5efe:10.0.0.1]/"),
    "translated": ("http://[::ffff:0:127.0.0.1]/",),
}
for _why, _urls in _SPECIAL.items():
    _deny(_why, *_urls)
    _deny(f"{_why}: for the loopback's friends, too", _urls[0], origins=(OWN, PROGRAM))
    _deny(f"{_why}: with the token, too", _urls[0], origins=(TOKEN,))

# -- what DNS says ----------------------------------------------------------------------------------

for _answer in (
    "127.0.0.1",
    "::1",
    "::ffff:127.0.0.1",
    "0.0.0.0",
    "10.1.2.3",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.1.1",
    "fd00:ec2::254",
    "fe80::1%eth0",
    "64:ff9b::7f00:1",
    "255.255.255.255",
    "224.0.0.1",
):
    _deny("a name may lead anywhere", "http://rebind.example:8080/", answers=(_answer,))
    _deny("one bad address is enough", "http://mixed.example/", answers=("93.184.216.34", _answer))
_deny("names that spell an address", "http://127.0.0.1.nip.example/", answers=("127.0.0.1",))
_deny("a short name of the inner network", "http://redis:6379/", "http://intranet/", answers=("10.0.0.7",))
_deny("the cluster", "https://kubernetes.default.svc/", answers=("10.96.0.1",), origins=EVERYBODY)
_allow("our own host, for our own user", "http://this-host/", answers=("127.0.1.1",), origins=LOCAL)
_deny("our own host, for others", "http://this-host/", answers=("127.0.1.1",), origins=FOREIGN)

# -- ports ------------------------------------------------------------------------------------------

_deny(
    "a port of something that is not HTTP",
    *(f"http://93.184.216.34:{port}/" for port in (1, 21, 22, 23, 25, 53, 110, 139, 389, 445, 587, 1023)),
    *(f"http://hooks.example:{port}/" for port in (22, 25, 465, 2049, 5060, 6000, 6667, 10080)),
)
_deny("our own user's mail server", "http://127.0.0.1:25/", "http://localhost:22/", origins=LOCAL)
_deny("no such port", "http://hooks.example:0/", "http://hooks.example:65536/", "http://hooks.example:99999/")
_deny("a port that is no plain number", "http://hooks.example:080/", "http://hooks.example:+80/")
_deny("a port that is not there", "http://hooks.example:/", "http://hooks.example:80:80/")

# -- schemes and shapes -----------------------------------------------------------------------------

_deny(
    "only unix, http and https",
    "file:///etc/passwd",
    "ftp://93.184.216.34/",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "dict://127.0.0.1:11211/stats",
    "ldap://127.0.0.1/",
    "tftp://127.0.0.1/",
    "ws://93.184.216.34/",
    "data:text/plain,hello",
    "javascript:alert(1)",
    "jar:http://93.184.216.34!/",
    "http+unix://%2Frun%2Fdocker.sock/",
    "tcp://127.0.0.1:80",
    "//93.184.216.34/",
    "93.184.216.34",
    "",
    " http://93.184.216.34/",
)
_deny("not for our own user either", "file:///etc/passwd", "gopher://127.0.0.1:6379/", origins=LOCAL)
_deny(
    "credentials",
    "http://user@93.184.216.34/",
    "http://user:pass@93.184.216.34/",
    "http://@93.184.216.34/",
    "http://:@93.184.216.34/",
    "http://hooks.example@127.0.0.1/",
    "http://hooks.example:80@127.0.0.1/",
    "http://127.0.0.1@hooks.example/",
    "http://a@b@127.0.0.1/",
    "http://hooks.example:80\\@127.0.0.1/",
    "http://[::1]@hooks.example/",
)
_deny("credentials of our own user", "http://user:pass@127.0.0.1/", origins=LOCAL)
_deny(
    "two parsers, two opinions",
    "http://hooks.example\\.evil.example/",
    "http://127.0.0.1\\.hooks.example/",
    "http:\\\\127.0.0.1/",
    "http:/127.0.0.1/",
    "http:127.0.0.1",
    "http:///127.0.0.1/",
    "http:////127.0.0.1/",
    "http://hooks.example /",
    "http://hooks.example\t/",
    "http://127.0\n.0.1/",
    "http://hooks.example\r\nHost: x/",
    "http://hooks.example,127.0.0.1/",
    "http://hooks.example;127.0.0.1/",
    "http://hooks.example&127.0.0.1/",
    "http://(127.0.0.1)/",
    "http://{hooks}.example/",
    "http://127.0.0.1*/",
    "http://*.example/",
    "http://hooks..example/",
    "http://.example/",
    "http://./",
    "http://../",
    "http://-hooks.example/",
    "http://hooks-.example/",
    "http://hooks.example../",
    "http://" + "a" * 64 + ".example/",
    "http://" + "a." * 130 + "example/",
    "http://hooks.example/" + "a" * 8192,
)
_deny(
    "brackets",
    "http://[127.0.0.1]/",
    "http://[localhost]/",
    "http://[]/",
    "http://[::1/",
    "http://::1/",
    "http://[::1]]/",
    "http://[[::1]]/",
    "http://[::1].example/",
    "http://[::1]8080/",
    "http://[::1:]/",
    "http://[1::2::3]/",
    "http://[v1.::1]/",
    "http://[::127.1]/",
    "http://[::ffff:0177.0.0.1]/",
    "http://[::ffff:127.0.0.1.]/",
    "http://[0x::1]/",
)

# -- rules ------------------------------------------------------------------------------------------

_allow("a network", "http://10.1.2.3/", "https://10.9.9.9:8443/", rules=("10.0.0.0/8",))
_allow("for HTTP peers as well", "http://10.1.2.3/", rules=("10.0.0.0/8",), origins=EVERYBODY)
_allow("an address", "http://10.1.2.3/", rules=("10.1.2.3",))
_deny("that address alone", "http://10.1.2.4/", rules=("10.1.2.3",))
_allow("one of two rules", "http://10.1.2.3/", rules=("10.9.9.9", "10.1.2.3"))
_allow("a network at a port", "http://10.1.2.3:8080/", rules=("10.0.0.0/8:8080",))
_deny("at that port alone", "http://10.1.2.3/", "http://10.1.2.3:8081/", rules=("10.0.0.0/8:8080",))
_deny("a rule without a port is for the usual ones", "http://10.1.2.3:25/", rules=("10.0.0.0/8",))
_allow("an unusual port", "http://10.1.2.3:25/", "http://10.1.2.3:6667/", rules=("10.0.0.0/8:*",))
_allow("an unusual port of a public host", "http://8.8.8.8:81/", rules=("8.8.8.8:81",))
_deny("of that host alone", "http://8.8.4.4:81/", rules=("8.8.8.8:81",))
_allow("the loopback", "http://127.0.0.1:8080/", rules=("127.0.0.1:8080",), origins=FOREIGN)
_deny("in one spelling only", "http://localhost:8080/", rules=("127.0.0.1:8080",))
_allow("both spellings", "http://localhost/", rules=("127.0.0.1", "[::1]"), answers=("127.0.0.1",))
_allow("by name", "http://localhost:8080/", rules=("LOCALHOST.:8080",), answers=("127.0.0.1", "::1"))
_deny("by name only", "http://127.0.0.1:8080/", rules=("localhost:8080",))
_allow("mapped is the same address", "http://[::ffff:10.1.2.3]/", rules=("10.0.0.0/8",))
_deny("tunnelled is not", "http://[64:ff9b::10.1.2.3]/", "http://[2002:a01:203::1]/", rules=("10.0.0.0/8",))
_allow("the tunnel itself", "http://[64:ff9b::10.1.2.3]/", rules=("[64:ff9b::/96]",))
_allow("IPv6", "http://[fd00::1]:8080/", rules=("[fd00::/8]:8080",))
_allow("an IPv6 address", "http://[fd00::1]/", rules=("[fd00::1]",))
_deny("another one", "http://[fd00::2]/", rules=("[fd00::1]",))
_allow("what a name leads to", "http://hooks.corp/", rules=("10.0.0.0/8",), answers=("10.1.2.3",))
_deny("all of it", "http://hooks.corp/", rules=("10.0.0.0/8",), answers=("10.1.2.3", "192.168.0.1"))
_allow("a name within", "http://hooks.corp/", rules=("hooks.corp",), answers=("10.1.2.3", "fd00::1"))
_allow("a name at the loopback", "http://Hooks.Corp./", rules=("hooks.corp",), answers=("127.0.0.1",))
_allow("a name at a port", "http://hooks.corp:81/", rules=("hooks.corp:81",), answers=("10.1.2.3",))
_deny("that port alone", "http://hooks.corp/", rules=("hooks.corp:81",), answers=("10.1.2.3",))
_deny("that name alone", "http://a.hooks.corp/", rules=("hooks.corp",), answers=("10.1.2.3",))
_deny("not its tail", "http://evilhooks.corp/", rules=("hooks.corp",), answers=("10.1.2.3",))
_deny("an unusual port of another name", "http://other.corp:81/", rules=("hooks.corp:81",))
_allow("a port by its network", "http://a.corp:81/", rules=("10.0.0.0/8:81",), answers=("10.1.2.3",))
_deny("that network only", "http://a.corp:81/", rules=("10.0.0.0/8:81",), answers=("93.184.216.34",))
_deny(
    "an allowed name does not open the metadata service",
    "http://hooks.corp/",
    rules=("hooks.corp:*",),
    answers=("169.254.169.254",),
)
_deny("nor does its own name", "http://metadata.goog/", rules=("metadata.goog",))
_allow("its address does", "http://169.254.169.254/", rules=("169.254.169.254:80",))
_allow("everything", "http://127.0.0.1:22/", "http://[::1]:22/", rules=("0.0.0.0/0:*", "[::/0]:*"))
_deny(
    "everything has a scheme and a spelling", "ftp://a/", "http://127.1/", rules=("0.0.0.0/0:*", "[::/0]:*")
)

# -- unix, by its text alone ------------------------------------------------------------------------

_deny("an HTTP peer without the token", "unix:///run/hook.sock", origins=(HTTP,))
_deny("rule or not", "unix:///run/hook.sock", origins=(HTTP,), rules=("unix:/run",))
_allow("the rest is its owner's", "unix:///run/hook.sock", origins=(*LOCAL, OTHER, TOKEN))
_allow("a path is literal", "unix:///run/a b%20c?d#e.sock", origins=(OTHER,))
_deny(
    "a path that is none, or is a riddle",
    "unix://relative.sock",
    "unix:/run/hook.sock",
    "unix://",
    "UNIX:///run/hook.sock",
    "unix:///run/hooks/../docker.sock",
    "unix:///run/..",
    "unix:///run/a\0b",
    "unix:///run/a\nb",
    "unix:///" + "a" * 107,
    origins=(OWN, OTHER),
)
