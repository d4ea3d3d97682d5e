"""Calls by an asyncio program with a Tracker."""

from __future__ import annotations

import asyncio
import time

from acomm import Request, Tracker


async def tracker_calls(url: str, in_flight: int, calls: int) -> list[float]:
    """The seconds that all calls took together, then those of each."""
    async with Tracker() as tracker:
        clock, each = time.perf_counter, []

        async def call_many(values: range) -> None:
            for value in values:
                started = clock()
                response = await tracker.call(url, Request("echo", [value]))
                each.append(clock() - started)
                if response.result_as(int) != value:
                    raise AssertionError(f"{value} did not come back")

        async def all_of(calls: int) -> float:
            started = clock()
            await asyncio.gather(*(call_many(range(caller, calls, in_flight)) for caller in range(in_flight)))
            return clock() - started

        await all_of(max(100, 2 * in_flight))
        each.clear()
        return [await all_of(calls), *each]
