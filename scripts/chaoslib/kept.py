"""A client on our own channels: all requests on one kept connection, and a hook that keeps its own."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from acomm.acks import ok_ack
from acomm.channel import Channels
from acomm.connection import Connection
from acomm.errors import AcommError, ConnectionLost
from acomm.listener import UnixListener
from acomm.messages import Request
from acomm.outgoing import Outgoing
from acomm.urls import unix_url
from chaoslib.history import outcome
from chaoslib.peer import ACK_TIMEOUT, Ask, Command, Given, NoAck, Refused, Sender, commands

WINDOW = 2048
"""Many, as a supervisor that is killed again and again leaves those for last that it was killed with."""


async def main(given: Given) -> None:
    log = given.log()
    path = str(Path(given.folder, f"{given.name}.sock"))
    channels = Channels(timeout=ACK_TIMEOUT)
    supervisor = unix_url(given.socket)

    async def exchange(ask: Ask) -> None:
        acknowledged: asyncio.Future[AcommError | None] = asyncio.get_running_loop().create_future()
        request = Request(ask.task, [ask.number], id=ask.id, response_hook=ask.hook or unix_url(path))
        payload = request.encode(extended=True)
        channels.post(supervisor, Outgoing(payload, acknowledged.set_result, wire=3, extended=True))
        error = await acknowledged
        if isinstance(error, ConnectionLost):  # and Unreachable
            raise NoAck from error
        if error is not None:
            raise Refused(error.code)

    sender = Sender(given, log, exchange, way="kept", window=WINDOW)

    def answered(conn: Connection, data: bytes) -> None:
        message = json.loads(data)
        log.note("posted", message["id"], outcome(message), 1)
        sender.answered(message["id"])
        conn.acknowledge(ok_ack(b'""', 3, True), grants=True)

    def do(command: Command) -> None:
        if command["do"] == "settle":
            sender.settle()

    async with UnixListener(path, on_message=answered):
        running = asyncio.create_task(sender.run())
        await commands(do)
        running.cancel()
        await channels.close()


if __name__ == "__main__":
    asyncio.run(main(Given.read(sys.argv[1])))
