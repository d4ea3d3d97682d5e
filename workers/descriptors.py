"""How many descriptors there are for connections, so that the others always find some. Pure.

ZeroMQ aborts the process when its accept gets none, and nobody else does well without: so what is accepted is
limited long before that.
"""

from __future__ import annotations

from workers.errors import ConfigError

SPARE = 64
"""Descriptors that nobody counts on: files, resolvers, what handlers open."""

PER_WORKER = 8
"""Pipes, sockets and files that a worker takes in its supervisor, one that is replaced and its successor."""


def connections(wanted: int, limit: int, *, workers: int, others: int = 0) -> int:
    """How many connections of the `wanted` ones can be taken, when `limit` descriptors may be open, and
    `others` are for something else. A caller counts twice: we connect to its hook, too. Raises ConfigError.
    """
    left = (limit - SPARE - PER_WORKER * workers - others) // 2
    if left < 1:
        raise ConfigError(
            f"only {limit} descriptors may be open (ulimit -n), which is too few for {workers} workers: "
            f"{SPARE + PER_WORKER * workers + others + 2} are the fewest"
        )
    return min(wanted, left)
