"""What is fuzzed, by name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol

from fuzzing.argumenttargets import Arguments
from fuzzing.doortargets import Http, Unix
from fuzzing.hooktargets import Hooks
from fuzzing.messagetargets import Framing, Requests, Responses
from fuzzing.workertargets import Answers, Slots


class Target(Protocol):
    """It raises what must not happen: an unexpected exception, or an AssertionError."""

    def samples(self) -> list[bytes]:
        """Inputs to begin with, good ones for the most part."""

    def feed(self, data: bytes, dice: random.Random) -> None:
        """Take one input; what else is by chance is by `dice`."""


TARGETS: dict[str, type[Any]] = {
    "framing": Framing,
    "requests": Requests,
    "responses": Responses,
    "arguments": Arguments,
    "answers": Answers,
    "slots": Slots,
    "unix": Unix,
    "http": Http,
    "hooks": Hooks,
}

KEPT = Path(__file__).resolve().parents[2] / "tests" / "fuzzed"


def kept(name: str) -> list[Path]:
    """Inputs at which a target once failed, and some that mutations hardly come by."""
    return sorted((KEPT / name).glob("*"))


def begin(name: str, target: Target) -> list[bytes]:
    """What a target is begun with: its samples, and what is kept of it."""
    return target.samples() + [path.read_bytes() for path in kept(name)]
