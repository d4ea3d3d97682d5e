"""A new supervisor and an old one that does not say what it does: see `test_takeover` for real ones."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from workers import successor
from workers.errors import ConfigError
from workers.successor import Offer
from workers.takeover import Line


@pytest_asyncio.fixture
async def ends() -> AsyncIterator[tuple[Offer, Line]]:
    here, there = socket.socketpair()
    old = await Line.over(there)
    offer = Offer(await Line.over(here), 1, None, {}, None)
    yield offer, old
    offer.line.close()
    old.close()


async def test_one_that_says_nothing_is_not_waited_for(
    ends: tuple[Offer, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(successor, "PATIENCE", 0.01)
    with pytest.raises(ConfigError, match="the live supervisor 1 does not say whether it hands over"):
        await ends[0].agreed()


async def test_one_that_asks_for_time_has_it(ends: tuple[Offer, Line]) -> None:
    offer, old = ends
    agreed = asyncio.create_task(offer.agreed())
    await old.expect("ready")
    for _ in range(3):
        await old.say("resting")
    assert not agreed.done()
    await old.say("go")
    await asyncio.wait_for(agreed, 10)
