"""New code in a running supervisor: a new template tries it first, then it is imported here, too.

    reload --> Pool.renew ... first worker ready --> fresh modules, Registry --> Pool.accept
                     |                                     |
                     +--- does not import, dies -----------+--> all is as it was

The template is a process beside us, so code that does not import, or takes long to, is nobody's trouble. What
it could import is imported here in the main thread, as at the start.
"""

from __future__ import annotations

import asyncio
import linecache
import os
import site
import sys
import sysconfig
from collections.abc import Awaitable, Callable, Iterable
from importlib.machinery import ExtensionFileLoader
from types import ModuleType

import acomm
from workers.errors import AcommError, Conflict
from workers.pool import Pool
from workers.registry import Registry

_NOT_ITS_OWN = ("site-packages", "dist-packages")


class Reloader:
    """Loads the tasks of `names`, as `Registry.from_modules` takes them, again into `pool`.
    `follow(registry)` has the sockets of tasks follow, and new requests checked by it.
    """

    def __init__(
        self, pool: Pool, names: Iterable[str], follow: Callable[[Registry], Awaitable[None]]
    ) -> None:
        self._pool = pool
        self._names = tuple(names)
        self._follow = follow
        self.reloads = 0

    async def reload(self, registry: Registry) -> Registry:
        """The new tasks, which take the place of those in `registry`. Raises AcommError when the new code
        cannot be used, Conflict when a later reload came; the old code is served then.
        """
        tried: asyncio.Future[AcommError | None] = asyncio.get_running_loop().create_future()

        def told(error: AcommError | None) -> None:
            if not tried.done():
                tried.set_result(error)

        self._pool.renew(registry.modules, registry.paths, told)
        error = await tried
        if error is not None:
            raise error
        old = forget(registry.modules, registry.paths)
        try:
            fresh = Registry.from_modules(self._names)
            await self._follow(fresh)
        except BaseException:
            put_back(old, registry.modules, registry.paths)
            self._pool.reject()
            raise
        if not self._pool.accept():
            put_back(old, registry.modules, registry.paths)
            await self._follow(registry)
            raise Conflict("a later reload has taken its place, or its first worker has died")
        self.reloads += 1
        return fresh


def forget(modules: Iterable[str], paths: Iterable[str]) -> dict[str, ModuleType]:
    """Take the user's own modules out of `sys.modules`, so that they are imported anew; what they were.

    Those are the packages that the task modules are in, and what was imported from the folders where they
    were found; without libraries, extension modules, which cannot be loaded twice, and ourselves.
    """
    names = _own(modules, paths)
    linecache.checkcache()
    return {name: sys.modules.pop(name) for name in names}


def put_back(old: dict[str, ModuleType], modules: Iterable[str], paths: Iterable[str]) -> None:
    """Undo `forget`, and what was imported since."""
    for name in _own(modules, paths):
        del sys.modules[name]
    sys.modules.update(old)


def _own(modules: Iterable[str], paths: Iterable[str]) -> list[str]:
    packages = {name.partition(".")[0] for name in modules}
    folders = tuple(os.path.join(os.path.realpath(path), "") for path in paths)
    return [name for name, module in list(sys.modules.items()) if _is_own(name, module, packages, folders)]


def _is_own(name: str, module: ModuleType, packages: set[str], folders: tuple[str, ...]) -> bool:
    top = name.partition(".")[0]
    if top in ("__main__", "acomm", "workers") or not isinstance(module, ModuleType):
        return False
    if isinstance(getattr(getattr(module, "__spec__", None), "loader", None), ExtensionFileLoader):
        return False
    if top in packages:
        return True
    places = _places(module)
    return bool(places) and all(place.startswith(folders) and not _is_library(place) for place in places)


def _places(module: ModuleType) -> list[str]:
    """Where a module was loaded from: its file, or the folders of a package that has none."""
    file = getattr(module, "__file__", None)
    found = [file] if file else list(getattr(module, "__path__", ()))
    return [os.path.realpath(place) for place in found if isinstance(place, str)]


def _is_library(place: str) -> bool:
    return place.startswith(_LIBRARIES) or any(part in _NOT_ITS_OWN for part in place.split(os.sep))


_LIBRARIES = tuple(
    os.path.join(os.path.realpath(folder), "")
    for folder in {
        *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        os.path.dirname(acomm.__file__),
        os.path.dirname(__file__),
    }
)
