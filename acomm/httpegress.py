"""The egress policy for aiohttp: sessions whose connections go nowhere that the policy forbids."""

from __future__ import annotations

import resource
import socket
from functools import cache
from typing import TYPE_CHECKING, Any

from acomm.egress import Guard, Policy
from acomm.errors import Forbidden
from acomm.origin import Origin

# aiohttp takes longer to import than all of acomm: imported where used.
if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult
else:
    AbstractResolver = object


class PolicyResolver(AbstractResolver):
    """A resolver for aiohttp that gives out nothing but addresses that `origin` may reach.

    aiohttp does not ask a resolver about addresses that stand in the URL: use `connector`, which sees to
    them, too.
    """

    def __init__(self, policy: Policy, origin: Origin, what: str = "the hook") -> None:
        self.policy = policy
        self.origin = origin
        self.what = what

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = await self.policy.lookup(host, port, family, self.origin, self.what)
        return [
            {
                "hostname": host,
                "host": address.host,
                "port": address.port,
                "family": address.family,
                "proto": socket.IPPROTO_TCP,
                "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            }
            for address in addresses
        ]

    async def close(self) -> None:
        """Nothing to close."""


@cache
def _connector_class() -> Any:
    import aiohttp
    from aiohttp.connector import Connection

    class PolicyConnector(aiohttp.TCPConnector):
        """Judges each request, before one of the open connections is taken for it, too."""

        def __init__(self, policy: Policy, origin: Origin, what: str, **options: Any) -> None:
            super().__init__(resolver=PolicyResolver(policy, origin, what), **options)
            self._judge = (policy, origin, what)

        async def connect(self, req: aiohttp.ClientRequest, traces: Any, timeout: Any) -> Connection:
            policy, origin, what = self._judge
            if req.proxy is not None:
                raise Forbidden(f"{what} would be reached through a proxy, which could lead anywhere")
            policy.check(str(req.url.origin()), origin, what)
            return await super().connect(req, traces, timeout)

    return PolicyConnector


def connector(policy: Policy, origin: Origin, what: str = "the hook", **options: Any) -> aiohttp.TCPConnector:
    """An aiohttp connector that connects only where `origin` may go; `options` are TCPConnector's.

    It raises Forbidden out of the request: for a forbidden host or address, for each hop of a redirect,
    for any proxy. Its open connections are lent to whoever uses it, so share it only between origins
    whose `local` is the same.
    """
    made: aiohttp.TCPConnector = _connector_class()(policy, origin, what, **options)
    return made


def session(
    guard: Guard | None,
    *,
    timeout: float,
    limit_per_host: int = 32,
    what: str = "the hook",
) -> aiohttp.ClientSession:
    """An aiohttp session for messages to hooks, judged by `guard` (None: the program's own URLs): no
    proxies from the environment, no cookies, `timeout` seconds for a whole exchange. Redirects are the
    request's to refuse: `allow_redirects=False`.

    All hosts together have a quarter of the descriptors that the process may open: whatever the limit, enough
    hosts that take connections and say nothing use it up, and then the others wait for them.
    """
    import aiohttp

    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 0 if descriptors == resource.RLIM_INFINITY else max(descriptors // 4, limit_per_host)
    limits: dict[str, Any] = {"limit": limit, "limit_per_host": limit_per_host}
    return aiohttp.ClientSession(
        trust_env=False,
        timeout=aiohttp.ClientTimeout(total=timeout, connect=timeout),
        connector=aiohttp.TCPConnector(**limits) if guard is None else connector(*guard, what, **limits),
        # Many hooks share a session; what one of them sets is not the others' business.
        cookie_jar=aiohttp.DummyCookieJar(),
    )
