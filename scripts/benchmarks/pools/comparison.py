"""The rounds: each case with each contender, in turn, each time in a new process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import rotated
from benchmarks.pools.cases import Case
from benchmarks.pools.contenders import CONTENDERS
from benchmarks.pools.samples import Sample

LIMIT = 120.0
"""Seconds for one measurement, in which the largest that any pool is fit for is done with time to spare."""

GOODBYE = 0.5
"""Seconds for the processes of a measurement to end by themselves."""

_PROGRAM = "import sys; from benchmarks.pools.child import main; main(*sys.argv[1:])"
_SCRIPTS = Path(__file__).resolve().parent.parent.parent


class Failed(Exception):
    """A measurement did not come to a result, and not because its contender cannot."""


class Result(NamedTuple):
    figures: Mapping[str, Sequence[object]]
    cannot: str
    seconds: float


def compare(
    cases: Sequence[Case],
    names: Sequence[str],
    rounds: int,
    size_of: Callable[[Case], int],
    turns: int,
    tell: Callable[[str], None],
) -> tuple[list[Sample], list[Failed]]:
    """All samples, of the contenders named and of the floors of each case; what failed has no figure."""
    samples: list[Sample] = []
    failures: list[Failed] = []
    for number in range(rounds):
        took: dict[tuple[str, str], float] = {}
        for case in cases:
            size = size_of(case)
            if not size or number >= case.rounds:
                continue
            for name in rotated([*names, *case.floors], number):
                tell(f"round {number + 1} of {rounds}: {case.name}, {name}")
                try:
                    result = foreseen(case, name, took) or measure(case, name, size, turns)
                except Failed as failure:  # the others' figures are good, and took their time
                    failures.append(failure)
                    result = Result({}, "failed", 0.0)
                took[case.name, name] = result.seconds
                samples += _samples(number, case, name, result)
    return samples, failures


def foreseen(case: Case, name: str, took: Mapping[tuple[str, str], float]) -> Result | None:
    """Why there is nothing to be measured, if that is known before."""
    if name in CONTENDERS and (why := CONTENDERS[name].missing()):
        return Result({}, why, 0.0)
    seconds = took.get((case.after, name), 0.0) * case.growth
    if seconds > LIMIT:
        return Result({}, f"would take {seconds:,.0f} s", seconds)
    return None


def _samples(number: int, case: Case, name: str, result: Result) -> list[Sample]:
    if result.cannot:
        return [Sample(number, case.name, c.name, name, None, result.cannot) for c in case.columns]
    found = []
    for column in case.columns:
        value, note = result.figures[column.name]
        found.append(Sample(number, case.name, column.name, name, float(str(value)), str(note)))
    return found


def measure(case: Case, name: str, size: int, turns: int) -> Result:
    """One measurement, in a new process. Raises Failed."""
    arguments = [sys.executable, "-c", _PROGRAM, case.name, name, str(size), str(turns)]
    path = os.pathsep.join([str(_SCRIPTS.parent), str(_SCRIPTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    started = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            process.wait(LIMIT)
            seconds = time.monotonic() - started
        except subprocess.TimeoutExpired:
            return Result({}, f"no result in {LIMIT:.0f} s", LIMIT)
        finally:
            _end(process)
        output.seek(0)
        lines = output.read().decode().splitlines()
        if process.returncode or not lines:
            errors.seek(0)
            raise Failed(f"{case.name}, {name}: {errors.read().decode(errors='replace').strip()[-2000:]}")
        said = json.loads(lines[-1])
        return Result(said.get("figures", {}), said.get("cannot", ""), seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a measurement's session: it would disturb the next one."""
    if process.poll() is None:
        process.kill()
        process.wait()
    end = time.monotonic() + GOODBYE
    while left := _session(process.pid):
        if time.monotonic() > end:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.01)  # they are not our children: nothing tells of their end


def _session(leader: int) -> list[int]:
    """Living processes of a session; while there are any, its number is not given to another."""
    found = []
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdigit() and os.getsid(int(entry)) == leader and _lives(int(entry)):
                found.append(int(entry))
    return found


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
