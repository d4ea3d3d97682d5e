"""workers: a supervisor and its pool of worker processes, for CPU-heavy Python tasks.

Importing it is cheap: names are loaded when they are first used, so that a worker process, or a module
that only wants `@task`, does not load the supervisor.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.config import Config
    from workers.errors import SoftTimeout
    from workers.executor import PoolExecutor
    from workers.launcher import launch
    from workers.options import Retry
    from workers.registry import Registry, Task, task
    from workers.running import Context, context
    from workers.supervisor import Supervisor

_homes = {
    "Config": "workers.config",
    "Context": "workers.running",
    "PoolExecutor": "workers.executor",
    "Registry": "workers.registry",
    "Retry": "workers.options",
    "SoftTimeout": "workers.errors",
    "Supervisor": "workers.supervisor",
    "Task": "workers.registry",
    "context": "workers.running",
    "launch": "workers.launcher",
    "task": "workers.registry",
}

__all__ = [
    "Config",
    "Context",
    "PoolExecutor",
    "Registry",
    "Retry",
    "SoftTimeout",
    "Supervisor",
    "Task",
    "context",
    "launch",
    "task",
]


def __getattr__(name: str) -> Any:
    if name not in _homes:
        raise AttributeError(f"module 'workers' has no attribute {name!r}")
    value = getattr(import_module(_homes[name]), name)
    globals()[name] = value
    return value
