"""Tasks to copy and change.

Serve them with `acomm serve examples.primes -w 2`, then call them from another terminal:
`acomm call count_primes limit=1000000`.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from workers import Retry, context, task

Positive = Annotated[int, Meta(ge=1)]


@task
def add(a: int, b: int = 0) -> int:
    """Add two numbers."""
    return a + b


@task(timeout=60)
def count_primes(limit: Positive) -> int:
    """Count the primes below LIMIT, by trial division: pure Python, so it keeps a processor busy."""
    found = 0
    for number in range(2, limit):
        if number % 10_000 == 0:
            context().progress(number, limit)
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            found += 1
    return found


@task(retry=Retry(times=3, backoff=0.1))
def greet(name: str, times: Positive = 1) -> list[str]:
    """Greet NAME a few times."""
    return [f"hello {name}"] * times
