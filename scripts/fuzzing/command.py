"""The loop: mutated samples into one target after the other, and what is told of it."""

from __future__ import annotations

import argparse
import random
import time
import traceback
from pathlib import Path

import psutil

from fuzzing.mutation import mutated
from fuzzing.targets import TARGETS, Target, begin

MOST_GROWTH = 5_000_000
"""Bytes that a target may leave behind."""

_WARM = 20_000  # frames before memory is measured, and a tenth of all: caches fill
_LOOK = 1000  # frames between two looks at the clock
_TOLD = 10  # failures of a target that are shown and kept


def run(arguments: list[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Fuzz all that reads strangers' bytes.")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--frames", type=int, help="how many frames a target gets (default: 100000)")
    parser.add_argument("--total", type=int, help="how many frames all targets get together, instead")
    parser.add_argument("--minutes", type=float, help="for how long each target runs, instead")
    parser.add_argument("--guided", metavar="TARGET", choices=list(TARGETS), help="by coverage, with atheris")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for failing inputs")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name:12} {(TARGETS[name].__doc__ or '').splitlines()[0]}" for name in TARGETS))
        return 0
    if sum(limit is not None for limit in (given.frames, given.total, given.minutes)) > 1:
        parser.error("give one of --frames, --total and --minutes")
    if given.guided is not None:
        if given.target or given.total is not None:
            parser.error("--guided names its one target, and goes with --frames or --minutes")
        from fuzzing.guided import guide

        return guide(given.guided, given.frames, given.minutes, given.seed, given.keep)
    names = given.target or list(TARGETS)
    frames = given.frames or (100_000 if given.minutes is None else 2**62)
    if given.total is not None:
        frames = -(-given.total // len(names))
    seconds = (given.minutes or 1e9) * 60
    try:
        results = [fuzz(name, TARGETS[name](), frames, seconds, given.seed, given.keep) for name in names]
    except KeyboardInterrupt:
        return 130
    return 0 if all(results) else 1


def fuzz(name: str, target: Target, frames: int, seconds: float, seed: int, keep: Path) -> bool:
    """Run one target; whether all went well. Ctrl-C ends it, and what was found is told all the same."""
    dice, samples = random.Random(seed), begin(name, target)
    process, failures, done = psutil.Process(), 0, 0
    began, first = time.monotonic(), process.memory_info().rss
    warm, passed = first, 0.0
    interrupted = False
    while done < frames and passed < seconds and not interrupted:
        try:
            for _ in range(min(_LOOK, frames - done)):
                data = mutated(dice.choice(samples), samples, dice)
                done += 1
                try:
                    target.feed(data, dice)
                except Exception:
                    failures += 1
                    if failures <= _TOLD:
                        keep.mkdir(parents=True, exist_ok=True)
                        kept = keep / f"{name}-{seed}-{done}"
                        kept.write_bytes(data)
                        print(f"{name}: {kept}\n{traceback.format_exc()}", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        passed = time.monotonic() - began
        if done <= _WARM or done <= frames // 10 or (frames == 2**62 and passed <= seconds / 10):
            warm = process.memory_info().rss
    last = process.memory_info().rss
    print(
        f"{name:10} {done:>10,} frames {done / passed:>8,.0f}/s  {failures} exceptions  "
        f"memory {first / 1e6:.1f}, {warm / 1e6:.1f} warm, {last / 1e6:.1f} MB ({(last - warm) / 1e6:+.1f})",
        flush=True,
    )
    if interrupted:
        raise KeyboardInterrupt
    return not failures and last - warm < MOST_GROWTH
