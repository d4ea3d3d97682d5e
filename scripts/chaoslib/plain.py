"""Clients in the original's format: a connection a message, all three generations, nothing of acomm's."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from chaoslib.peer import (
    ACK_TIMEOUT,
    Ask,
    Command,
    Given,
    NoAck,
    PlainHook,
    Refused,
    Sender,
    commands,
    frame,
    read_frame,
    taken,
    url_object,
)

WINDOW = 256


async def main(given: Given) -> None:
    log = given.log()
    path = str(Path(given.folder, f"{given.name}.sock"))
    wire = {"raw": 1, "old": 2}.get(given.name.partition("-")[0], 3)

    async def exchange(ask: Ask) -> None:
        message = request(ask, ask.hook or f"unix://{path}", wire)
        try:
            reader, writer = await asyncio.open_unix_connection(given.socket)
        except OSError as error:
            raise NoAck from error
        try:
            async with asyncio.timeout(ACK_TIMEOUT):
                if wire == 1:
                    writer.write(json.dumps(message).encode())
                    writer.write_eof()
                    await reader.read()
                    return
                writer.write(frame(message))
                ack = await read_frame(reader)
        except (EOFError, OSError) as error:  # TimeoutError is one
            raise NoAck from error
        finally:
            writer.close()
        if ack["error"]:
            raise Refused("-" if wire < 3 else code(ack))

    sender = Sender(given, log, exchange, way="raw" if wire == 1 else "plain", window=WINDOW)
    hook = PlainHook(path, taken(log, sender))
    await hook.open()

    def do(command: Command) -> None:
        if command["do"] == "settle":
            sender.settle()

    running = asyncio.create_task(sender.run())
    await commands(do)
    running.cancel()
    await hook.close()


def code(ack: dict[str, Any]) -> str:
    """Peers of this kind are told a text only; a repeat that conflicts is the one that must not pass."""
    return "conflict" if "was used for another request" in ack["error"] else "-"


def request(ask: Ask, hook: str, wire: int) -> dict[str, Any]:
    if wire < 3:
        return {"id": ask.id, "task": ask.task, "responsehook": url_object(hook), "args": [ask.number]}
    return {
        "id": ask.id,
        "task": ask.task,
        "taskURL": None,
        "responseHook": url_object(hook),
        "streamURL": None,
        "args": [ask.number],
    }


if __name__ == "__main__":
    asyncio.run(main(Given.read(sys.argv[1])))
