"""Tasks that the tests of the journal serve."""

import os
import signal

from servedtasks import add, echo, fail, hold, spin, stay  # noqa: F401 - served, too

from workers import Retry, context, task


def note(path: str, text: str) -> None:
    """Add a line to a file that several processes write."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{text}\n".encode())
    finally:
        os.close(fd)


@task
def noted(path: str, value: int) -> int:
    """Leaves a trace of its run."""
    note(path, f"{context().request_id} {value}")
    return value


@task
def noted_failure(path: str) -> None:
    """Leaves a trace of its run, and fails."""
    note(path, context().request_id)
    raise ValueError("for good")


@task
def kill_supervisor(pid_file: str, runs: str) -> None:
    """What no supervisor survives."""
    note(runs, str(os.getpid()))
    with open(pid_file) as file:
        os.kill(int(file.read()), signal.SIGKILL)
    signal.pause()


@task(retry=Retry(0))
def unlucky(path: str) -> str:
    """Fails until somebody has made the file."""
    if not os.path.exists(path):
        raise ValueError("not yet")
    return "done"
