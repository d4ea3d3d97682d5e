"""The modules that a command line names, by import path or file; what goes wrong is one line saying where."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from workers.errors import ConfigError, printable


class Importer:
    """Imports what the command line names, and keeps the folders it needed, the first foremost. `machinery`
    are the files of ours that run within an import, where no fault of the user's is.
    """

    def __init__(self, paths: Iterable[str], machinery: Sequence[str]) -> None:
        self._machinery = (*machinery, __file__, "<frozen", importlib.__file__)
        self.paths: list[str] = []
        for folder in (str(Path.cwd()), *reversed(tuple(paths))):
            self._put_first(folder)

    def load(self, name: str) -> ModuleType:
        """Raises ConfigError in one line, which says where in the user's code it failed."""
        path = Path(name).absolute() if name.endswith(".py") else None
        if path is None:
            return self._import(name)
        if not path.is_file():
            raise ConfigError(f"there is no file {printable(path)}")
        self._put_first(str(path.parent))
        module = self._import(path.stem)
        loaded = getattr(module, "__file__", None)
        if loaded is None or not path.samefile(loaded):
            raise ConfigError(
                f"{printable(name)}: the name {path.stem} already belongs to {loaded or 'a built-in module'};"
                " rename the file"
            )
        return module

    def _put_first(self, folder: str) -> None:
        if folder in self.paths:
            self.paths.remove(folder)
        self.paths.insert(0, folder)
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)

    def _import(self, name: str) -> ModuleType:
        importlib.invalidate_caches()
        try:
            return importlib.import_module(name)
        # A module that calls sys.exit() must not pass for a clean exit of ours.
        except (Exception, SystemExit) as error:
            where = _failed_at(error, self._machinery)
            if where is None and isinstance(error, ModuleNotFoundError):
                hint = "; a file is named with its .py" if "/" in name else ""
                raise ConfigError(
                    f"there is no module {printable(name)}; looked in {Path.cwd()} and on sys.path{hint}"
                ) from error
            text = error.msg if isinstance(error, SyntaxError) else str(error)
            text = f"{type(error).__name__}: {printable(text)}" if text else type(error).__name__
            at = f" ({where})" if where else ""
            raise ConfigError(f"module {printable(name)} does not import: {text}{at}") from error


def _failed_at(error: BaseException, machinery: tuple[str, ...]) -> str | None:
    """Where in the user's own code an import failed; None if none of it ran."""
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return place(error.filename, error.lineno or 0)
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(machinery)
    ]
    libraries = tuple(
        {f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    )
    own = [frame for frame in frames if not frame[0].startswith((*libraries, "<"))]
    return place(*own[-1]) if own else place(*frames[0]) if frames else None


def place(filename: str, line: int) -> str:
    """A line of a file, as short as it can be told from here ("app/tasks.py:12")."""
    path = Path(filename)
    try:
        return f"{path.relative_to(Path.cwd())}:{line}"
    except (ValueError, OSError):
        return f"{path}:{line}"
