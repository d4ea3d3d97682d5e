"""The loop: mutated samples into one target after the other, and what is told of it."""

from __future__ import annotations

import argparse
import random
import time
import traceback
from pathlib import Path

import psutil

from fuzzing.mutation import mutated
from fuzzing.targets import TARGETS, Target

MOST_GROWTH = 5_000_000
"""Bytes that a target may leave behind."""

_WARM = 20_000  # frames before memory is measured: caches fill
_LOOK = 2000  # frames between two looks at the clock


def run(arguments: list[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Fuzz all that reads strangers' bytes.")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="default: all")
    parser.add_argument("--frames", type=int, help="how many frames a target gets (default: 100000)")
    parser.add_argument("--minutes", type=float, help="for how long each target runs, instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for failing inputs")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(arguments)
    if given.list:
        print(
            "\n".join(
                f"{name:12} {(TARGETS[name].__doc__ or '').splitlines()[0]}" for name in sorted(TARGETS)
            )
        )
        return 0
    if given.frames is not None and given.minutes is not None:
        parser.error("give --frames or --minutes, not both")
    frames = given.frames or (100_000 if given.minutes is None else 2**62)
    results = [
        fuzz(name, TARGETS[name](), frames, (given.minutes or 1e9) * 60, given.seed, given.keep)
        for name in given.target or sorted(TARGETS)
    ]
    return 0 if all(results) else 1


def fuzz(name: str, target: Target, frames: int, seconds: float, seed: int, keep: Path) -> bool:
    """Run one target; whether all went well."""
    dice, samples = random.Random(seed), target.samples()
    process, failures, done = psutil.Process(), 0, 0
    began, before = time.monotonic(), process.memory_info().rss
    while done < frames and time.monotonic() - began < seconds:
        for _ in range(min(_LOOK, frames - done)):
            data = mutated(dice.choice(samples), samples, dice)
            done += 1
            try:
                target.feed(data, dice)
            except Exception:
                failures += 1
                if failures <= 10:
                    keep.mkdir(parents=True, exist_ok=True)
                    kept = keep / f"{name}-{seed}-{done}"
                    kept.write_bytes(data)
                    print(f"{name}: {kept}\n{traceback.format_exc()}")
        if done <= _WARM:
            before = process.memory_info().rss
    took, growth = time.monotonic() - began, process.memory_info().rss - before
    print(
        f"{name:12} {done:>10,} frames {done / took:>9,.0f}/s  {failures} exceptions  {growth / 1e6:+.1f} MB",
        flush=True,
    )
    return not failures and growth < MOST_GROWTH
