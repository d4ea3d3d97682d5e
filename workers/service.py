"""A supervisor as a process: what starts and ends it, and who is told of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from workers.errors import AcommError, ConfigError

log = logging.getLogger("acomm.supervisor")

_COLLECT = (20_000, 10, 10)
"""When garbage is looked for (`gc.set_threshold`). Requests are freed by their reference counts, and those
under way are looked at in vain: by Python's 700 that took a tenth of the time of a supervisor with a journal,
in pauses of up to 10 ms.
"""


class Service(Protocol):
    """What is run: started, reloaded, drained, stopped. `unfinished` counts what a stop waits for; `leaving`
    is set when somebody has asked it to end once it has `finished`; `failed` is set when it cannot go on, for
    the reason that `failure` tells.
    """

    failed: asyncio.Event
    failure: str | None

    @property
    def leaving(self) -> asyncio.Event: ...
    @property
    def unfinished(self) -> int: ...
    async def reload(self) -> object: ...
    async def finished(self) -> bool: ...
    async def start(self) -> None: ...
    def begin_draining(self) -> None: ...
    async def stop(self, drain_timeout: float | None = None) -> None: ...


def run(service: Service, ready: Callable[[], None], *, until_eof: bool = False) -> None:
    """Run `service` until SIGTERM or SIGINT, then drain it; a second signal ends at once. `ready()` is called
    when it has started. `until_eof` stops likewise when standard input ends. Raises ConfigError, and
    AcommError when it cannot go on.
    """
    _raise_descriptor_limit()
    collect = gc.get_threshold()
    try:
        try:
            import uvloop
        except ImportError:
            asyncio.run(_run(service, ready, until_eof))
        else:
            uvloop.run(_run(service, ready, until_eof))
    finally:  # the program may go on
        gc.set_threshold(*collect)


async def _run(service: Service, ready: Callable[[], None], until_eof: bool) -> None:
    stop, now = asyncio.Event(), asyncio.Event()
    _listen_for_the_end(stop, now, until_eof)
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[None]] = set()
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # before it serves there is nothing to reload
    starting = loop.create_task(service.start())
    if not await _first(starting, stop.wait()):
        return
    try:
        # What start-up has made lives as long as we do: no collection need ever look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        ready()
        notify("READY=1")
        loop.add_signal_handler(signal.SIGHUP, _reload, service, reloads)
        if await _first(loop.create_task(_failure(service)), _either(stop, service.leaving)):
            raise AcommError(service.failure or "failed")
    except BaseException:
        await service.stop(0)
        raise
    service.begin_draining()  # before anybody is told
    notify("STOPPING=1")
    log.info("stopping: %d calls to finish", service.unfinished)
    patience: float | None = None
    if not stop.is_set():
        finishing = loop.create_task(service.finished())
        if await _first(finishing, stop.wait()) and not finishing.result():
            patience = 0.0
    stopping = loop.create_task(service.stop(patience))
    if not await _first(stopping, now.wait()):
        log.warning("stopped at once, by a second signal: %d calls unfinished", service.unfinished)
        await service.stop(0)


def _reload(service: Service, under_way: set[asyncio.Task[None]]) -> None:
    """SIGHUP: nobody waits for the outcome, which the log tells."""

    async def reload() -> None:
        with contextlib.suppress(AcommError):
            await service.reload()

    task = asyncio.get_running_loop().create_task(reload())
    under_way.add(task)
    task.add_done_callback(under_way.discard)


def _listen_for_the_end(stop: asyncio.Event, now: asyncio.Event, until_eof: bool) -> None:
    """Set `stop` at a signal, and at the end of standard input if that counts; `now` at a second signal."""

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    def on_input() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if until_eof:
        try:
            loop.add_reader(0, on_input)
        except OSError:  # a file, or /dev/null
            raise ConfigError("--until-eof needs a pipe or a terminal as standard input") from None


async def _failure(service: Service) -> None:
    await service.failed.wait()


async def _either(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


async def _first(work: asyncio.Task[Any], interruption: Coroutine[Any, Any, Any]) -> bool:
    """Wait for `work` unless `interruption` is first; whether it ended. Raises what `work` raises."""
    waiting = asyncio.ensure_future(interruption)
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
        return False
    work.result()
    return True


def notify_reloading() -> None:
    """Tell the service manager that a reload begins; `READY=1` follows when it has ended."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def notify(state: str) -> None:
    """Tell the service manager, as sd_notify(3) has it: a datagram to `$NOTIFY_SOCKET`. One that does not
    read is not waited for.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(state.encode())
        except OSError as error:
            log.warning("cannot notify the service manager: %s", error)


def _raise_descriptor_limit() -> None:
    """ZeroMQ aborts the process when it cannot have a descriptor, so have as many as we may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
