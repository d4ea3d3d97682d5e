"""Peers with bad manners: some end in the middle of a frame, some send thousands of requests at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from pathlib import Path

from chaoslib.peer import (
    ACK_TIMEOUT,
    Ask,
    Command,
    Given,
    PlainHook,
    commands,
    frame,
    read_frame,
    taken,
)
from chaoslib.plain import request

CONNECTIONS = 100
"""Connections of a flood at a time, each with a request behind the other."""


class Rough:
    def __init__(self, given: Given) -> None:
        self._given = given
        self._log = given.log()
        self._chances = given.random()
        self._number = 0
        self.hook = PlainHook(str(Path(given.folder, f"{given.name}.sock")), taken(self._log))

    def _ask(self) -> Ask:
        self._number += 1
        return Ask(f"{self._given.name}-{self._number}", "quick", self._number, None)

    def cut(self) -> None:
        """Send a part of a frame, from one byte to all but one, and end."""
        ask = self._ask()
        data = frame(request(ask, self.hook.url, 3))
        self._log.note("cut", ask.id)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1.0)
            sock.connect(self._given.socket)
            sock.sendall(data[: self._chances.randint(1, len(data) - 1)])

    async def flood(self, count: int) -> None:
        """Send so many requests as fast as they are acknowledged. What is not acknowledged is not sent again:
        whoever floods does not care.
        """
        asks = iter([self._ask() for _ in range(count)])

        async def some() -> None:
            for ask in asks:
                with contextlib.suppress(EOFError, OSError):
                    await self._send(ask)

        await asyncio.gather(*(some() for _ in range(CONNECTIONS)))

    async def _send(self, ask: Ask) -> None:
        reader, writer = await asyncio.open_unix_connection(self._given.socket)
        try:
            self._log.note("sent", ask.id, ask.task, ask.number, "flood")
            writer.write(frame(request(ask, self.hook.url, 3)))
            async with asyncio.timeout(ACK_TIMEOUT):
                ack = await read_frame(reader)
            if not ack["error"]:
                self._log.note("acked", ask.id)
        finally:
            writer.close()


async def main(given: Given) -> None:
    rough = Rough(given)
    await rough.hook.open()
    floods: set[asyncio.Task[None]] = set()

    def do(command: Command) -> None:
        if command["do"] == "cut":
            rough.cut()
        elif command["do"] == "flood":
            floods.add(task := asyncio.get_running_loop().create_task(rough.flood(command["count"])))
            task.add_done_callback(floods.discard)

    await commands(do)
    for task in floods:
        task.cancel()
    await rough.hook.close()


if __name__ == "__main__":
    asyncio.run(main(Given.read(sys.argv[1])))
