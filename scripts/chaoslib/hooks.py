"""Hooks that are in trouble for a while, when they are told to be, and come back at the same address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from chaoslib.history import Log, outcome
from chaoslib.peer import Command, Given, PlainHook, acknowledgement, commands

UNIX_HOOKS = 3


class Troubled:
    """What one hook does with an answer, as long as it is in trouble and after."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.trouble: str | None = None
        self.over = asyncio.Event()

    async def decide(self, message: dict[str, Any]) -> str | None:
        trouble = self.trouble
        self._log.note("posted", message["id"], outcome(message), int(trouble is None))
        if trouble is None:
            return ""
        if trouble == "refuse":
            return "not now"
        if trouble == "hang":
            await self.over.wait()
        return None


class Hooks:
    """Unix hooks by number, and behind them one over HTTP."""

    def __init__(self, given: Given) -> None:
        log = given.log()
        self.troubled = [Troubled(log) for _ in range(UNIX_HOOKS + 1)]
        self._unix = [
            PlainHook(path, troubled.decide)
            for path, troubled in zip(unix_paths(given.folder), self.troubled, strict=False)
        ]
        self._port_file = port_file(given.folder)
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def open(self) -> None:
        for number in range(UNIX_HOOKS + 1):
            await self._open(number)
        self._port_file.write_text(str(self._port))

    async def close(self) -> None:
        for number in range(UNIX_HOOKS + 1):
            await self._close(number)

    async def trouble(self, number: int, how: str, seconds: float) -> None:
        troubled = self.troubled[number]
        if troubled.trouble is not None:
            return
        troubled.over.clear()
        troubled.trouble = how
        if how == "gone":
            await self._close(number)
        await asyncio.sleep(seconds)
        if how == "gone":
            await self._open(number)
        troubled.trouble = None
        troubled.over.set()

    async def _open(self, number: int) -> None:
        if number < UNIX_HOOKS:
            await self._unix[number].open()
            return
        app = web.Application()
        app.router.add_post("/hook", self._post)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _close(self, number: int) -> None:
        if number < UNIX_HOOKS:
            await self._unix[number].close()
        elif self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _post(self, request: web.Request) -> web.Response:
        message = json.loads(await request.read())
        error = await self.troubled[-1].decide(message)
        if error is None:
            return web.Response(status=500)
        return web.json_response(acknowledgement(message, error))


def unix_paths(folder: str) -> list[str]:
    return [str(Path(folder, f"hook-{number}.sock")) for number in range(UNIX_HOOKS)]


def port_file(folder: str) -> Path:
    """Where the HTTP hook's port is told before it is ready."""
    return Path(folder, "hook.port")


async def main(given: Given) -> None:
    hooks = Hooks(given)
    await hooks.open()
    troubles: set[asyncio.Task[None]] = set()

    def do(command: Command) -> None:
        if command["do"] == "trouble":
            trouble = hooks.trouble(command["hook"], command["how"], command["seconds"])
            troubles.add(task := asyncio.get_running_loop().create_task(trouble))
            task.add_done_callback(troubles.discard)

    await commands(do)
    for task in troubles:
        task.cancel()
    with contextlib.suppress(OSError):
        await hooks.close()


if __name__ == "__main__":
    asyncio.run(main(Given.read(sys.argv[1])))
