"""Connections of the HTTP door, and how their callers are sent to another process without a refusal."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from aiohttp import web

from acomm.errors import alone
from workers import httpreplies as replies
from workers.errors import AcommError, BadRequest, printable

log = logging.getLogger("acomm.door")

QUIET = 20
"""Looks, moments apart, after which a kept connection that asks for nothing ends while callers are seen
off. A caller at work asks again meanwhile, and learns from the answer that he is to connect anew; one who
rests finds it closed, as any server may do. With a journal nobody is served meanwhile, so they are not
more. They are no seconds, as what has come while this process stood still is read between two of them.
"""


class HttpConnection(web.RequestHandler):
    """aiohttp's side of a connection, except that what is not HTTP is refused in our form, and not logged as
    a fault of ours.

    `asking` is whether a request of it is being answered, `offered` whether the supervisor knows of that;
    `asked` whether one was answered, and `quiet` the looks since.
    """

    asking = False
    offered = False
    asked = False
    quiet = 0

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was under way already")
        if status < 500:
            reason = printable((message or "").strip().partition("\n")[0])
            log.debug("not HTTP, from %s: %s", request.remote, reason)
            response = replies.refusal(BadRequest(f"this is not valid HTTP: {reason}"))
        else:
            log.error("an HTTP request could not be answered", exc_info=exc)
            response = replies.refusal(AcommError("the supervisor failed at this request; its log tells why"))
        response.force_close()
        if exc is not None:
            alone(exc)  # aiohttp has it in a frame that is in its traceback, beside what has come
        return response

    def connection_lost(self, exc: BaseException | None) -> None:
        for message, _ in getattr(self, "_messages", ()):  # and what came behind that, unanswered
            if (fault := getattr(message, "exc", None)) is not None:
                alone(fault)
        super().connection_lost(exc)


@contextmanager
def asking(request: web.BaseRequest) -> Iterator[None]:
    """Within, the request is being answered."""
    connection = request.protocol
    assert isinstance(connection, HttpConnection)
    connection.asking = True
    try:
        yield
    finally:
        connection.asking = connection.offered = False
        connection.asked = True
        connection.quiet = 0


def offered(request: web.BaseRequest) -> None:
    """The supervisor is asked to take it: from now on nobody but it decides."""
    connection = request.protocol
    assert isinstance(connection, HttpConnection)
    connection.offered = True


def see_off(connections: Iterable[web.RequestHandler]) -> bool:
    """A look: close those that rest. Whether some are left that have not asked for anything yet, or may yet
    again; those whose request the supervisor has are not among them, as its answer ends them.
    """
    left = False
    for connection in list(connections):
        if not isinstance(connection, HttpConnection) or connection.offered:
            continue
        if connection.asking:  # its request has not come whole
            left = True
            continue
        connection.quiet += connection.asked
        if connection.quiet > QUIET:
            connection.force_close()
        else:
            left = True
    return left
