"""Who has chosen where something is to lead: judged by `acomm.egress`, carried by calls."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple


class Origin(NamedTuple):
    """Who asked for a URL: a peer of the unix socket, by its uid; a peer over HTTP, `trusted` if it showed
    the token; or this program itself.
    """

    via: Literal["unix", "http", "program"]
    uid: int | None = None
    trusted: bool = False

    @classmethod
    def unix(cls, uid: int) -> Origin:
        return cls("unix", uid)

    @classmethod
    def http(cls, *, trusted: bool = False) -> Origin:
        return cls("http", None, trusted)

    @property
    def text(self) -> str:
        """It as text, for `parse`."""
        if self.via == "unix":
            return f"unix:{self.uid}"
        return f"{self.via}:trusted" if self.trusted else self.via

    @classmethod
    def parse(cls, text: str) -> Origin:
        """The origin whose `text` it is. Raises ValueError."""
        via, _, rest = text.partition(":")
        if via == "unix":
            return cls.unix(int(rest))
        if via == "http":
            return cls.http(trusted=rest == "trusted")
        if text == "program":
            return cls("program")
        raise ValueError(f"not an origin: {text!r}")

    @property
    def local(self) -> bool:
        """Whether it may reach the loopback. All that sets one origin's HTTP apart from another's, so there
        is one session for those that may and one for those that may not.
        """
        return self.via == "program" or (self.via == "unix" and self.uid in (0, os.getuid()))

    @property
    def owners(self) -> frozenset[int]:
        """The uids whose sockets it may name. The HTTP token is in a file that only our user can read."""
        if self.via == "unix" and self.uid is not None:
            return frozenset({self.uid, os.getuid()} if self.local else {self.uid})
        return frozenset({os.getuid()} if self.via == "program" or self.trusted else ())

    def __str__(self) -> str:
        if self.via == "unix":
            return f"uid {self.uid}"
        return "this program" if self.via == "program" else "an HTTP peer"


PROGRAM = Origin("program")
