"""Call: one call under way, its answer, and how far it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

from acomm import jsontext
from acomm.accepted import Accepted, read_accepted
from acomm.errors import printable
from acomm.itemstream import Stream
from acomm.messages import Response
from acomm.streamreaders import decline

log = logging.getLogger("acomm.client")

Decode = Callable[[Any], Any]


class Progress(NamedTuple):
    """How far a call is: `done` of `total` (None if it does not tell), in the task's own unit, and its
    `note`. `state` is the supervisor's word for it: "queued", "running", "streaming".
    """

    done: float = 0.0
    total: float | None = None
    note: str = ""
    state: str = ""


class Caller(Protocol):
    """What a Call needs of its client."""

    def in_own_thread(self) -> bool: ...
    def stop_remote(self, id: str) -> None: ...
    def watch(self, call: Call) -> None: ...


class Call(Future[Any]):
    """A call under way: a `concurrent.futures.Future` that can also be awaited. `id` is the request's, and
    `sent_stream` the URL of the stream that went along with it.

    When the answer is a stream, the result is a `Stream`, and the call itself may be iterated over in its
    place: `for item in call` and `async for item in call`. TypeError says that the answer is no stream.
    """

    def __init__(
        self,
        client: Caller,
        id: str,
        task: str,
        decode: Decode | None = None,
        decode_item: Decode | None = None,
    ) -> None:
        super().__init__()
        self.id = id
        self.task = task
        self._client = client
        self._decode = decode
        self._decode_item = decode_item
        self._progress: Progress | None = None
        self._stream: Stream | None = None
        self._ack = b""
        self.sent_stream: str | None = None

    @property
    def progress(self) -> Progress | None:
        """How far the call is, as last heard, or None. The first look has the client ask the supervisor some
        times a second, from then on until the call has ended.
        """
        if self.under_way():
            self._client.watch(self)
        return self._progress

    @property
    def position(self) -> int | None:
        """How many requests waited before this one when it was accepted; None before that, and where the
        service does not tell.
        """
        accepted = self._accepted()
        return None if accepted is None else accepted.position

    @property
    def expected_wait(self) -> float | None:
        """After how many seconds the call was expected to begin when it was accepted; None before that, and
        where it is not known.
        """
        accepted = self._accepted()
        return None if accepted is None else accepted.expected_wait

    def _accepted(self) -> Accepted | None:
        return read_accepted(self._ack) if self._ack else None  # few ask, so it is read only then

    def under_way(self) -> bool:
        """Whether its task may still run: there is no answer yet, or a stream that has not ended."""
        return not self.done() or (self._stream is not None and not self._stream.closed)

    def cancel(self) -> bool:
        """Stop waiting, and have the supervisor stop the task, even one that runs. If the answer is a stream
        that has not ended, close it, which stops its task. False if there is nothing to stop any more.
        """
        if self.cancelled():
            return True
        if super().cancel():
            self._client.stop_remote(self.id)
            return True
        if not self.under_way() or self._stream is None:
            return False
        self._stream.close()
        return True

    def result(self, timeout: float | None = None) -> Any:
        """The result, waited for. Raises the call's error, TimeoutError after `timeout` seconds, RuntimeError
        in a Call's callback, which would wait for ever.
        """
        self._check_wait(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error, waited for as in `result`; None if there is none."""
        self._check_wait(timeout)
        return super().exception(timeout)

    def _check_wait(self, timeout: float | None) -> None:
        if not self.done() and timeout != 0 and self._client.in_own_thread():
            raise RuntimeError("a Call's callback cannot wait for a call: its thread brings the answers")

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()

    def __iter__(self) -> Iterator[Any]:
        self.result()
        return iter(self._streamed())

    async def __aiter__(self) -> AsyncIterator[Any]:
        await self
        async with aclosing(aiter(self._streamed())) as items:
            async for item in items:
                yield item

    def _streamed(self) -> Stream:
        if self._stream is None:
            raise TypeError(f"the answer of {printable(self.task)} is no stream: take the call's result")
        return self._stream

    # -- the client's thread ------------------------------------------------------------------------

    def resolve(self, response: Response) -> None:
        """Become done with the response's error, result or stream."""
        if response.error is not None:
            self.end(None, response.error)
            return
        try:
            raw = b"null" if response.result is None else memoryview(response.result)
            if response.stream_url is not None:
                result = self._stream = self._stream_from(response, jsontext.parse(raw, "result"))
            else:
                result = jsontext.parse(raw, "result") if self._decode is None else self._decode(raw)
        except Exception as error:
            self.end(None, error)
            return
        if not self.end(result, None) and self._stream is not None:
            self._stream.close()  # it was cancelled meanwhile: nobody will read it

    def _stream_from(self, response: Response, result: Any) -> Stream:
        assert response.stream_url is not None
        return Stream(
            response.stream_url,
            format=response.stream_format,
            decode=self._decode_item,
            result=result,
            on_close=self._stream_closed,
        )

    def _stream_closed(self, read: bool) -> None:
        if not read:
            self._client.stop_remote(self.id)
        if self.sent_stream is not None:
            decline(self.sent_stream)  # its task has ended

    def end(self, result: Any, error: BaseException | None) -> bool:
        """Become done; False if the call was cancelled before. Our own thread runs the callbacks then, and
        what they raise must not end it.
        """
        if not self.set_running_or_notify_cancel():
            return False
        try:
            self.set_result(result) if error is None else self.set_exception(error)
        except BaseException:  # Future itself catches an Exception; this is a SystemExit
            log.exception("a callback of the call %s failed", self.id)
        return True

    def note_accepted(self, ack: bytes) -> None:
        self._ack = ack

    def note_progress(self, progress: Progress) -> None:
        self._progress = progress
