"""Hosts: the one spelling of each that all parsers read alike, and what is special about an address or port.
Where a URL may lead is for `acomm.egress` to say.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from acomm.errors import Forbidden, printable

IP = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

USUAL_PORTS = frozenset({80, 443})
BLOCKED_PORTS = frozenset(
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080}
)
"""From 1024 up, the "bad ports" of the Fetch standard: their protocols may take a POST for commands."""

# IANA's IPv4 and IPv6 special-purpose address registries. The first range that fits gives the kind, so
# metadata services, which lie within the others, come first: AWS (also ECS, EKS), Alibaba, Oracle, Azure;
# then AWS, EKS, Google, Oracle, Scaleway and OpenStack over IPv6.
_special: dict[str, str] = {
    "metadata": (
        "169.254.169.254 169.254.170.2 169.254.170.23 100.100.100.200 192.0.0.192 168.63.129.16 "
        "fd00:ec2::254 fd00:ec2::23 fd20:ce::254 fd00:c1::a9fe:a9fe fd00:42::42 fe80::a9fe:a9fe"
    ),
    "loopback": "127.0.0.0/8 ::1",
    "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 fec0::/10",
    "shared (CGNAT)": "100.64.0.0/10",
    "link-local": "169.254.0.0/16 fe80::/10",
    "unspecified": "0.0.0.0/8 ::",
    "multicast": "224.0.0.0/4 ff00::/8",
    "broadcast": "255.255.255.255",
    "benchmarking": "198.18.0.0/15 2001:2::/48",
    "documentation": "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20",
    "Teredo": "2001::/32",
    "6to4": "2002::/16 192.88.99.0/24",
    "reserved": "192.0.0.0/24 240.0.0.0/4 2001::/23",
}
_ranges: list[tuple[str, Network]] = [
    (kind, ipaddress.ip_network(text)) for kind, texts in _special.items() for text in texts.split()
]
_global_unicast = IPv6Network("2000::/3")
_nat64 = IPv6Network("64:ff9b::/96")
_isatap = (0x00005EFE, 0x02005EFE)  # RFC 5214: the upper half of an interface identifier

_loopback: tuple[IP, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
_known_names: dict[str, tuple[IP, ...]] = {
    **dict.fromkeys(
        "localhost localhost4 localhost6 localhost.localdomain localhost4.localdomain4 "
        "localhost6.localdomain6 ip6-localhost ip6-loopback".split(),
        _loopback,
    ),
    **dict.fromkeys(
        "metadata metadata.google.internal metadata.goog instance-data instance-data.ec2.internal "
        "metadata.azure.com metadata.azure.internal metadata.tencentyun.com".split(),
        (IPv4Address("169.254.169.254"),),
    ),
}
"""Names whose addresses are known without asking: they are refused at submission."""

# Authority and no more; what this does not match, two parsers might read in two ways.
_http_url = re.compile(
    r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([1-9][0-9]{0,4}))?(?=[/?#]|\Z)", re.ASCII | re.IGNORECASE
)
_label = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_number = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


# -- spelling ---------------------------------------------------------------------------------------


def host_and_port(url: str, what: str) -> tuple[str, int]:
    """Those of an http or https URL, which `what` names. Raises Forbidden for a host that is not plain."""
    match = _http_url.match(url)
    if match is None:
        raise Forbidden(
            f"{what} has a host that is not plain: {printable(url)}; write names in ASCII (xn--...), "
            "addresses as four decimal numbers or in brackets, and no percent signs"
        )
    scheme, host, port = match.groups()
    return host, int(port) if port else (443 if scheme.lower() == "https" else 80)


def spelled_address(host: str, what: str) -> IP | None:
    """The address that `host` spells in its one canonical way, None for a name. Raises Forbidden for
    numbers that some resolver takes for an address: `127.1`, `0177.0.0.1`, `0x7f000001`, `2130706433`.
    """
    try:
        if ":" in host:
            return IPv6Address(host.removeprefix("[").removesuffix("]"))
        if ends_in_number(host.removesuffix(".")):
            return IPv4Address(host)
    except ValueError:
        raise Forbidden(
            f"{what} has a host that is a disguised or broken address: {printable(host)}"
        ) from None
    return None


def ends_in_number(host: str) -> bool:
    """The URL standard's test for an address: a name never ends in a number."""
    return _number.fullmatch(host.rpartition(".")[2].lower()) is not None


def known_addresses(name: str) -> tuple[IP, ...]:
    """The addresses of a canonical name, where they are known without asking."""
    return _loopback if name.endswith(".localhost") else _known_names.get(name, ())


def canonical_name(host: str) -> str | None:
    """A DNS name in lower case without its last dot; None if it is none."""
    name = host.lower().removesuffix(".")
    valid = len(name) <= 253 and all(_label.fullmatch(label) for label in name.split("."))
    return name if valid else None


# -- addresses --------------------------------------------------------------------------------------


def usual_port(port: int) -> bool:
    """Whether a port may be named without a rule for it."""
    return port in USUAL_PORTS or (1024 <= port <= 65535 and port not in BLOCKED_PORTS)


def unmapped(address: IP) -> IP:
    """The IPv4 address that the kernel really connects to for `::ffff:a.b.c.d`."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def kind_of(address: IP) -> str | None:
    """What is special about an address; None for the public internet."""
    for kind, network in _ranges:
        if address in network:
            return kind
    if isinstance(address, IPv4Address):
        return None
    inner = IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _nat64 or (int(address) >> 32) & 0xFFFFFFFF in _isatap:
        kind_within = kind_of(inner)
        if kind_within is not None:
            return f"{kind_within}: a tunnel to {inner}"
        return None if address in _nat64 else _outside(address)
    return _outside(address)


def _outside(address: IPv6Address) -> str | None:
    return None if address in _global_unicast else "reserved"
