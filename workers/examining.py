"""What is asked before a request is taken: may it name these URLs, which task is it for, do its arguments
fit.
"""

from __future__ import annotations

import difflib
import math
import time
from typing import Any, NamedTuple

from acomm import handlers
from acomm.egress import Policy
from acomm.messages import Request
from acomm.origin import Origin
from acomm.tracker import Tracker
from acomm.urls import unix_path
from workers.admission import Account
from workers.calls import Call
from workers.errors import BadRequest, Forbidden, UnknownTask, printable
from workers.lanes import UNLIMITED
from workers.offering import Resolve
from workers.registry import Registry, Task

_ADMITTED_FOR = 1.0
_MAX_ADMITTED = 4096
"""Seconds, and URLs, for which a URL that the policy has let pass is not looked at again."""


class Examined(NamedTuple):
    """A request that may be done, and its digest: by a `task` of ours, whose call has this `key`, or by the
    service at its task URL. `size` is that of its arguments, which count for `account`.
    """

    request: Request
    content: bytes
    origin: Origin
    account: Account
    size: int
    resolve: Resolve | None = None
    task: Task[..., Any] | None = None
    key: bytes | None = None


class Examiner:
    """Knows the tasks of `registry`, which may be replaced, and where `policy` lets requests lead. `url` is
    our own, as soon as that is known.
    """

    def __init__(self, registry: Registry, policy: Policy, tracker: Tracker) -> None:
        self.registry = registry
        self.url = ""
        self._policy = policy
        self._tracker = tracker
        self._admitted: dict[tuple[str, Origin], float] = {}

    def is_ours(self, request: Request) -> bool:
        """Whether one of our tasks is asked for, and not another service."""
        return request.task_url is None or request.task_url == self.url

    def check_urls(self, request: Request, origin: Origin) -> None:
        """Refuse what the policy does not let `origin` name. It is asked again when we connect; here it is
        so that the requester learns of it, and what has passed a moment ago passes.
        """
        for what, url in (
            ("the hook", request.response_hook),
            ("the task URL", request.task_url if request.task_url != self.url else None),
            ("the stream URL", request.stream_url),
        ):
            if url is None or self._tracker.channels.connected(url, origin):
                continue
            now = time.monotonic()
            if self._admitted.get((url, origin), 0.0) < now:
                self._policy.admit(url, origin, what)
                if len(self._admitted) >= _MAX_ADMITTED:
                    self._admitted.clear()
                self._admitted[url, origin] = now + _ADMITTED_FOR

    def check_call(self, request: Request, origin: Origin) -> tuple[Task[..., Any], bytes | None]:
        """The task of a request, and its call's key. Raises UnknownTask, BadArgs, and for handlers what does
        not let them run here.
        """
        task = self._task(request.task)
        self.check_handlers(request, origin)
        # A stream that a request brings is an argument, too, and nobody else's.
        key = None if task.key is None or request.stream_url else task.call_key(request.args)
        if key is None:
            task.check_args(request.args)
        return task, key

    def check_forward(self, request: Request, *, resolved: bool) -> None:
        """Raises BadRequest for what cannot be passed on to another service. `resolved`: whoever has asked
        waits for the answer.
        """
        if request.handlers is not None:
            raise BadRequest("a request for another service cannot bring handlers")
        if request.response_hook is None and not resolved:
            raise BadRequest("a request for another service needs a response hook")
        if unix_path(request.task_url or "") is None and self._tracker.external_proxy_url is None:
            raise BadRequest(
                "a task URL over HTTP needs a supervisor with --http, where the answer can come in"
            )

    def _task(self, name: str) -> Task[..., Any]:
        task = self.registry.get(name)
        if task is not None:
            return task
        near = difflib.get_close_matches(name, self.registry, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownTask(f"no task {printable(name)} is served here{hint}")

    @staticmethod
    def check_handlers(request: Request, origin: Origin) -> None:
        """Refuse handlers that do not run here. Raises Forbidden, HandlerError."""
        if request.handlers is None:
            return
        if not origin.local:
            raise Forbidden("handlers are taken from the supervisor's own user only")
        handlers.check_versions(request.handlers.python, request.handlers.dill)


def args_size(request: Request) -> int:
    """Bytes of a request's arguments."""
    return 0 if request.args is None else len(memoryview(request.args))


def call_of(request: Request, task: Task[..., Any], origin: Origin, key: bytes | None) -> Call:
    """The call that does a request: what it asks for, and else what its task says."""
    retry = task.retry
    in_lane = task.isolated or task.overlaps
    return Call(
        task.name,
        None if request.args is None else bytes(request.args),
        id=request.id,
        tag=request,
        priority=request.priority or task.priority,
        timeout=math.inf if task.timeout is None and task.max_memory is not None else task.timeout,
        concurrency=UNLIMITED if in_lane and task.concurrency is None else task.concurrency,
        overlaps=task.overlaps,
        isolated=task.isolated,
        max_memory=task.max_memory,
        deadline=None if request.timeout is None else time.monotonic() + request.timeout,
        retries=retry.times if retry else 0,
        crashes=retry.crashes if retry else 0,
        backoff=retry.delay if retry else None,
        stream_url=request.stream_url,
        stream_format=task.stream_format,
        origin=origin if task.streams or request.stream_url is not None else None,
        key=key,
    )
