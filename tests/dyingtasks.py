"""Tasks that print, hang and die, for the tests of what is known of it afterwards."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time

from workers.registry import task


def tell(path: str, what: object) -> None:
    with open(path, "w") as fifo:
        fifo.write(f"{what}\n")


@task
def say(out: str, err: str) -> None:
    print(out)
    print(err, file=sys.stderr)


@task
def say_and_die(out: str, err: str, how: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(out)
    os.write(2, err.encode())
    if how == "segfault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


@task
def flood(megabytes: int, stream: int, dies: bool) -> int:
    """Writes so much from C code, then a last line."""
    block = b"x" * (1 << 20)
    for _ in range(megabytes):
        rest = block
        while rest:
            rest = rest[os.write(stream, rest) :]
    os.write(stream, b"\nthe end\n")
    if dies:
        os._exit(3)
    return megabytes


@task
def hang(path: str) -> None:
    print("I hang")
    tell(path, os.getpid())
    time.sleep(10_000)


@task
def crunch_when_told(path: str) -> int:
    """C code that holds the interpreter lock for minutes."""
    tell(path, os.getpid())
    return sum(range(10**10))


@task
def tidy(path: str, trace: str) -> None:
    """Cleans up when it is told to stop."""
    try:
        tell(path, os.getpid())
        time.sleep(10_000)
    finally:
        with open(trace, "a") as file:
            file.write("tidied\n")


@task
async def tidy_later(path: str, trace: str) -> None:
    import asyncio

    try:
        tell(path, os.getpid())
        await asyncio.sleep(10_000)
    finally:
        with open(trace, "a") as file:
            file.write("tidied\n")


@task
def stubborn(path: str, how: str) -> None:
    """Does not stop when it is told to."""
    if how == "default":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if how == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
    told = False
    while True:
        try:
            if not told:
                told = True
                tell(path, os.getpid())
            time.sleep(10_000)
        except BaseException:
            if how == "translate":
                raise ValueError("on purpose") from None


@task
def family(path: str, how: str) -> None:
    """Leaves descendants of each kind behind: in C code, deaf to TERM, in sessions of their own, without a
    parent, without an environment.
    """
    python = [sys.executable, "-c"]
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deaf = f"{ignore}; print('x', flush=True); time.sleep(10000)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    crunch = subprocess.Popen([*python, "print('x', flush=True); sum(range(10**10))"], **pipes)
    stubborn = subprocess.Popen([*python, deaf], start_new_session=True, **pipes)
    for child in (crunch, stubborn):
        assert child.stdout is not None
        child.stdout.read(1)
    double = subprocess.run(
        ["sh", "-c", "setsid sleep 10000 >/dev/null 2>&1 & echo $!"], capture_output=True, check=True
    )
    bare = subprocess.Popen(["sleep", "10000"], env={}, start_new_session=True)
    pids = [crunch.pid, stubborn.pid, int(double.stdout), bare.pid]
    tell(path, " ".join(map(str, pids)))
    if how == "exit":
        os._exit(5)
    time.sleep(10_000)


@task
def score() -> int:
    with open("/proc/self/oom_score_adj") as file:
        return int(file.read())
