"""Programs that use `connect()`: calls whose results, or errors, they wait for."""

from __future__ import annotations

import asyncio
import sys
from urllib.parse import quote

from acomm.client import connect
from acomm.errors import AcommError
from acomm.urls import unix_url
from chaoslib.peer import Command, Given, commands
from chaoslib.work import TASKS, WEIGHTS

CALLERS = 64


async def main(given: Given) -> None:
    log = given.log()
    chances = given.random()
    settling = asyncio.Event()
    pause = CALLERS / given.rate

    async def calls(caller: int) -> None:
        number = caller
        while not settling.is_set():
            number += CALLERS
            (task,) = chances.choices(TASKS, tuple(WEIGHTS.values()))
            call = client.submit(task, number)
            log.note("sent", call.id, task, number, "user")
            try:
                what = f"ok:{await call}"
            except AcommError as error:
                what = f"error:{error.code}:{quote(str(error)[:200], safe='')}"
            log.note("returned", call.id, what)
            await asyncio.sleep(pause)

    def do(command: Command) -> None:
        if command["do"] == "settle":
            settling.set()

    async with connect(unix_url(given.socket)) as client:
        callers = [asyncio.create_task(calls(caller)) for caller in range(CALLERS)]
        await commands(do)
        for caller in callers:
            caller.cancel()


if __name__ == "__main__":
    asyncio.run(main(Given.read(sys.argv[1])))
