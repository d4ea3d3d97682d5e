"""A target by coverage: atheris, which is libFuzzer, goes on with what has reached new code.

It must see our modules before anything else imports them, so it has a process of its own, which this module
is as a program: `python -m fuzzing.guided TARGET FLAG...`, where the flags are libFuzzer's.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from fuzzing.mutation import PIECES

LONGEST = 4096
"""Bytes of an input: what goes wrong with more than that goes wrong with less, too."""

_SLOW = 10
"""Seconds in which any input of that length is done a thousand times over."""

_ROOM = 1024
"""MB of memory that the process may take; a tenth of it is ours."""

_SCRIPTS = Path(__file__).resolve().parents[1]

MISSING = (
    "scripts/fuzz --guided needs atheris, which is not installed here: scripts/setup dev,fuzz installs it "
    "(on x86-64, for Python 3.11 to 3.14)"
)


def guide(name: str, frames: int | None, minutes: float | None, seed: int, keep: Path) -> int:
    """Run a target for so many frames or minutes (by default one minute); the exit status. An input that
    fails, takes long or too much memory ends it, and is kept in the folder `keep`.
    """
    if importlib.util.find_spec("atheris") is None:
        print(MISSING, file=sys.stderr)
        return 2
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs")
        inputs.mkdir()
        words = Path(folder, "words")
        words.write_text("".join(f'"{_escaped(piece)}"\n' for piece in PIECES))
        limit = f"-runs={frames}" if frames is not None else f"-max_total_time={(minutes or 1) * 60:.0f}"
        flags = [limit, f"-max_len={LONGEST}", f"-seed={seed}", f"-dict={words}", f"-timeout={_SLOW}"]
        flags += [
            f"-rss_limit_mb={_ROOM}",
            f"-artifact_prefix={keep}/{name}-",
            "-print_final_stats=1",
            "-verbosity=0",
        ]
        command = [sys.executable, "-m", "fuzzing.guided", name, *flags, str(inputs)]
        path = f"{_SCRIPTS.parent}{os.pathsep}{_SCRIPTS}"
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    if not any(keep.iterdir()):
        keep.rmdir()
    return 0 if done.returncode == 0 else 1


def _escaped(piece: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in piece)


def main() -> None:
    import atheris

    name, flags = sys.argv[1], sys.argv[2:]
    with atheris.instrument_imports(include=["acomm", "workers"]):
        from fuzzing.targets import TARGETS, begin
    target = TARGETS[name]()
    for number, sample in enumerate(begin(name, target)):
        Path(flags[-1], str(number)).write_bytes(sample)

    def one(data: bytes) -> None:
        target.feed(data, random.Random(zlib.crc32(data)))

    atheris.Setup([sys.argv[0], *flags], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
