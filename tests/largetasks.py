"""What the tests of large arguments and results run."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def made(seed: int, size: int) -> np.ndarray[Any, Any]:
    """An array of `size` bytes, whose last 8 say what is in it."""
    array = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)
    array[-8:] = np.frombuffer(zlib.crc32(array[:-8]).to_bytes(8, "big"), dtype=np.uint8)
    return array


def is_sound(array: np.ndarray[Any, Any]) -> bool:
    return bool(zlib.crc32(array[:-8]) == int.from_bytes(bytes(array[-8:]), "big"))


def checked(array: np.ndarray[Any, Any], seed: int, size: int) -> np.ndarray[Any, Any]:
    """Another one; the argument is looked at before and after that is made."""
    assert is_sound(array)
    result = made(seed, size)
    assert is_sound(array)
    return result


def is_mapped(array: np.ndarray[Any, Any]) -> bool:
    """Whether it lies in shared memory."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "acomm-segments" in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                return True
    return False


def overwrite(array: np.ndarray[Any, Any]) -> Any:
    """Writes to its argument, and dies of it."""
    array[:] = 0
    os.abort()


def doubled(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array *= 2
    return array


KEPT: list[Any] = []


def keep(array: np.ndarray[Any, Any]) -> int:
    KEPT.append(array)
    return len(KEPT)


def kept_are_sound(_: object = None) -> bool:
    return all(map(is_sound, KEPT))


def fork_with(array: np.ndarray[Any, Any], go: str, told: str) -> None:
    """Leaves a process behind that tells, when it is let go, whether the argument is as it was."""
    if not os.fork():
        Path(go).read_text()
        Path(told).write_text(str(is_sound(array)))
        os._exit(0)


def fork_and_return(size: int) -> np.ndarray[Any, Any]:
    """Both processes return a result."""
    pid = os.fork()
    result = made(1 if pid else 2, size)
    if pid:
        os.waitpid(pid, 0)
    return result
