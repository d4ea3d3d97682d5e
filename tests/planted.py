"""`python planted.py serve ...`: a supervisor with one defect, to see whether it is found.

PLANTED says which: `drop`, one answer in a thousand is not posted; `twice`, one in a thousand is posted a
second time, with another result; `forget`, a recovery takes up every second row of a page. (The
first ones may well be such as have been delivered, and only the note of it is lacking.)
"""

import os
from itertools import count
from typing import Any

import msgspec

from acomm.delivery import Delivery
from acomm.messages import Response
from workers.cli import main
from workers.journalfile import JournalFile, Row

_numbers = count(1)
_post, _unfinished = Delivery.post, JournalFile.unfinished


def drop(self: Delivery, url: str, response: Response, *args: Any, **options: Any) -> None:
    if next(_numbers) % 1000:
        _post(self, url, response, *args, **options)


def twice(self: Delivery, url: str, response: Response, *args: Any, **options: Any) -> None:
    _post(self, url, response, *args, **options)
    if not next(_numbers) % 1000 and response.error is None:
        other = msgspec.structs.replace(response, result=msgspec.Raw(b"0"))
        _post(self, url, other, *args)


def forget(self: JournalFile, after: int, limit: int, upto: int) -> list[Row]:
    return _unfinished(self, after, limit, upto)[1::2]


match os.environ["PLANTED"]:
    case "drop":
        Delivery.post = drop  # type: ignore[method-assign]
    case "twice":
        Delivery.post = twice  # type: ignore[method-assign]
    case "forget":
        JournalFile.unfinished = forget  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
