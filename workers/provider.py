"""Sockets where a coordinator finds our tasks: `DIR/<task>/<priority>-<name>.sock`, as the original has it.

A coordinator of the Go original lists `DIR/<task>/` for each request, takes what is a socket there, and tries
one after another, in the text order of their names, until one acknowledges without an error. So a socket is
there only while we take requests, and any refusal sends the coordinator on to the next provider.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable

from acomm.listener import UnixListener
from acomm.socketpath import check_folder
from acomm.urls import MAX_UNIX_PATH, go_dials
from workers.config import Config
from workers.errors import ConfigError, printable

COORDINATORS_OWN = frozenset({"coordinator", "response", "streams"})
"""Folders in which the original keeps sockets that are no task's: requests for a task of such a name would
go to them.
"""

Listen = Callable[[str, str], UnixListener]


class Provider:
    """One socket a task, from `start` to `stop`. `listen(path, task)` makes the listener for requests that
    are for `task` alone. Folders that are missing get `folder_mode`, less the umask, and stay.
    """

    def __init__(self, folder: str, paths: dict[str, str], listen: Listen, folder_mode: int = 0o700) -> None:
        self.folder = folder
        self.folder_mode = folder_mode
        self.listeners = {task: listen(path, task) for task, path in paths.items()}

    @classmethod
    def of(cls, config: Config, tasks: Iterable[str], listen: Listen) -> Provider | None:
        """The provider that the settings ask for, if they do. Raises ConfigError for what no coordinator
        could reach.
        """
        folder, name = config.provider_dir, config.provider_name
        if folder is None:
            if name is not None:
                raise ConfigError("provider_name is given, but no provider_dir: give both, or neither")
            return None
        if name is None:
            raise ConfigError("provider_dir needs a provider_name: sockets are named PRIORITY-NAME.sock")
        paths = {task: socket_path(folder, task, config.provider_priority, name) for task in tasks}
        # Coordinators list the folders, so those of other users must be able to read them.
        return cls(os.path.abspath(folder), paths, listen, 0o755 if config.socket_mode & 0o077 else 0o700)

    @property
    def paths(self) -> list[str]:
        """The sockets' paths."""
        return [listener.addr for listener in self.listeners.values()]

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return sum(listener.connections for listener in self.listeners.values())

    async def start(self) -> None:
        """Make the sockets. Raises AddressInUse when another provider is alive at one of them, ConfigError
        for a folder where others could swap them; call `stop` then, too.
        """
        check_folder(self.folder, self.folder_mode)
        for listener in self.listeners.values():
            check_folder(os.path.dirname(listener.addr), self.folder_mode)
            await listener.start()

    async def follow(self, other: Provider) -> list[str]:
        """Have the sockets that `other`, which is not started, would have; the paths of those that are new.
        Raises as `start` does, and then has what it had.
        """
        new = {task: other.listeners[task] for task in other.listeners.keys() - self.listeners.keys()}
        try:
            for listener in new.values():
                check_folder(os.path.dirname(listener.addr), self.folder_mode)
                await listener.start()
        except BaseException:
            for listener in new.values():
                await listener.stop(0)
            raise
        gone = [self.listeners.pop(task) for task in self.listeners.keys() - other.listeners.keys()]
        self.listeners |= new
        for listener in gone:
            await listener.stop(0)
        return [listener.addr for listener in new.values()]

    def hide(self) -> None:
        """Remove the sockets' files, so that coordinators go to others; who has connected is served."""
        for listener in self.listeners.values():
            listener.hide()

    async def stop(self) -> None:
        await asyncio.gather(*(listener.stop(0) for listener in self.listeners.values()))


def socket_path(folder: str, task: str, priority: int, name: str) -> str:
    """Where a coordinator with the socket folder `folder` looks for `task` at the provider `name`.

    Raises ConfigError when it would not find it there.
    """
    if not folder:
        raise ConfigError("provider_dir is empty: give the coordinator's socket_dir")
    # A Go coordinator escapes other characters, and then knocks at a path that is not ours.
    if not go_dials(os.path.abspath(folder)):
        raise ConfigError(f"provider_dir {printable(folder)}: {_PLAIN}")
    if fault := _fault(name):
        raise ConfigError(f"provider_name {printable(name) or 'is empty'}: {fault}")
    if task in COORDINATORS_OWN:
        raise ConfigError(
            f"the task {task} cannot be served by a provider, as coordinators keep sockets of their own in a "
            "folder of that name: give it another one with @task(name=...)"
        )
    if fault := _fault(task):
        raise ConfigError(
            f"the task {printable(task)} cannot be served by a provider: {fault}; give it another name with "
            "@task(name=...)"
        )
    path = os.path.join(os.path.abspath(folder), task, f"{priority}-{name}.sock")
    if len(path) > MAX_UNIX_PATH:
        raise ConfigError(
            f"the socket path of the task {task} is {len(path)} bytes long, the kernel takes "
            f"{MAX_UNIX_PATH}: choose a shorter provider_dir or provider_name than in {path}"
        )
    return path


_PLAIN = "coordinators reach letters, digits and ._~$&+,:;=@- only"


def _fault(name: str) -> str | None:
    """What is wrong with `name` as a file's or folder's name; None if nothing is."""
    if not name or name in (".", "..") or "/" in name:
        return "it must be a file's name"
    return None if go_dials(name) else _PLAIN
