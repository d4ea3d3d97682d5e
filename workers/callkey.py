"""Which calls of a task are the same: the values of the parameters that its `key` names, as bytes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import msgspec

_LONGEST = 64
"""Bytes that a key keeps as they are; of longer ones it keeps a hash, as an argument may have megabytes."""

_encode = msgspec.json.Encoder(order="deterministic").encode


class CallKey:
    """The parameters `names` of `function`, read from bound arguments.

    Raises ValueError for a name that no parameter has, or one that stands for several arguments (`*args`),
    and for a default that JSON cannot express.
    """

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...]) -> None:
        parameters = inspect.signature(function).parameters
        positional = [
            p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        keywords = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
        self._fields: list[tuple[int, str, Any]] = []
        if not names or len(set(names)) < len(names):
            raise ValueError(f"key must name parameters, each once, not {names!r}")
        for name in names:
            if name not in positional and name not in keywords:
                takes = ", ".join(positional + keywords) or "none"
                raise ValueError(f"key names {name!r}, which is no parameter of its own; it has {takes}")
            default = parameters[name].default
            if default is not inspect.Parameter.empty:
                try:
                    _encode(default)
                except Exception as error:
                    raise ValueError(
                        f"key names {name}, whose default {default!r} JSON cannot express"
                    ) from error
            at = positional.index(name) if name in positional else len(positional)
            self._fields.append((at, name, default))

    def of(self, bound: tuple[tuple[Any, ...], dict[str, Any]]) -> bytes:
        """The key of a call with these arguments. A parameter that is not given has its default."""
        args, kwargs = bound
        values = [
            args[at] if at < len(args) else kwargs.get(name, default) for at, name, default in self._fields
        ]
        data = _encode(values)
        return data if len(data) <= _LONGEST else hashlib.blake2b(data, digest_size=32).digest()
