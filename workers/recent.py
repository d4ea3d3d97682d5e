"""Which ids were seen lately, with what content, and what came of them: repeats and conflicts. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from acomm.messages import Request, Response

KEEP_SECONDS = 600.0
KEEP_IDS = 100_000
JUST_NOW = 5.0
"""Seconds for which an answer that was given may still be on its way."""

KEEP_BYTES = 64 * 1024 * 1024
"""Bytes of answers kept for repeats, in all."""


def digest(request: Request) -> bytes:
    """16 bytes that requests share whose task, argument bytes and hook are the same, in all processes."""
    hook = request.response_hook or ""
    head = f"{len(request.task)} {len(hook)} {request.task}{hook}".encode("utf-8", "surrogatepass")
    found = blake2b(head, digest_size=16)
    if request.args is not None:
        found.update(b"\0")
        found.update(request.args)
    return found.digest()


class Done(NamedTuple):
    """An id whose request has been answered."""

    digest: bytes
    when: float
    response: Response
    size: int


class Recent:
    """The ids in flight, and the ids answered in the last KEEP_SECONDS with their answers."""

    def __init__(
        self, *, seconds: float = KEEP_SECONDS, ids: int = KEEP_IDS, max_bytes: int = KEEP_BYTES
    ) -> None:
        self._seconds = seconds
        self._ids = ids
        self._max_bytes = max_bytes
        self._in_flight: dict[str, bytes] = {}
        self._done: OrderedDict[str, Done] = OrderedDict()
        self._bytes = 0
        self._inherited: dict[str, bytes] = {}
        self._inherited_at: float | None = None

    def __len__(self) -> int:
        return len(self._in_flight) + len(self._done)

    def begin(self, id: str, digest: bytes) -> None:
        """An id that is not known has been accepted."""
        self._in_flight[id] = digest

    def known(self, id: str, now: float) -> bytes | None:
        """The digest of a known id."""
        self._forget(now)
        digest = self._in_flight.get(id)
        if digest is None and self._inherited:
            digest = self._inherited.get(id)
        if digest is not None:
            return digest
        done = self._done.get(id)
        return None if done is None else done.digest

    def expected(self, id: str, now: float) -> bool:
        """Whether the answer under an id is to come, or was given just now."""
        done = self._done.get(id)
        if id in self._inherited and (self._inherited_at is None or self._inherited_at > now - JUST_NOW):
            return True
        return id in self._in_flight or (done is not None and done.when > now - JUST_NOW)

    def export(self) -> list[tuple[str, bytes]]:
        """All ids that are known, with their digests."""
        done = [(id, each.digest) for id, each in self._done.items()]
        return [*self._inherited.items(), *done, *self._in_flight.items()]

    def inherit(self, ids: Iterable[tuple[str, bytes]]) -> None:
        """These belong to the supervisor that was here before us, which answers them yet."""
        self._inherited.update(ids)
        self._inherited_at = None

    def inheritance_ended(self, now: float, *, done: bool) -> None:
        """That supervisor has ended: when it was `done` with them, or it has lost them."""
        self._inherited_at = now
        if not done:
            self._inherited.clear()

    def answer(self, id: str) -> Response | None:
        """The answer that was given under an id."""
        done = self._done.get(id)
        return None if done is None else done.response

    def finish(self, response: Response, now: float) -> None:
        """The request of `response` has been answered. The oldest answers make room."""
        digest = self._in_flight.pop(response.id, None)
        if digest is None:
            return
        before = self._done.pop(response.id, None)  # of a request that was replayed
        if before is not None:
            self._bytes -= before.size
        size = _size(response)
        self._done[response.id] = Done(digest, now, response, size)
        self._bytes += size
        self._forget(now)

    def _forget(self, now: float) -> None:
        if self._inherited and self._inherited_at is not None and self._inherited_at < now - self._seconds:
            self._inherited.clear()
        while self._done:
            oldest = next(iter(self._done.values()))
            if (
                oldest.when > now - self._seconds
                and len(self._done) <= self._ids
                and self._bytes <= self._max_bytes
            ):
                break
            self._bytes -= self._done.popitem(last=False)[1].size


def _size(response: Response) -> int:
    """Roughly, in bytes: what can be large is counted."""
    size = len(response.id)
    if isinstance(response.result, msgspec.Raw):
        size += len(memoryview(response.result))
    if response.error is not None:
        size += len(response.error.message) + len(response.error.traceback or "")
    return size
