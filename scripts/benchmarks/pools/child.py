"""One measurement, in a process of its own: the last line that it prints is the result, in JSON.

It is started by `-c`, so that no worker imports a main module.
"""

from __future__ import annotations

import json
import os
import sys

from benchmarks.pools.cases import CASES
from benchmarks.pools.contenders import CONTENDERS, Cannot


def main(case_name: str, contender_name: str, size: str, turns: str) -> None:
    """Prints {"figures": {column: [value, note]}} or {"cannot": why}."""
    case = CASES[case_name]
    try:
        if contender_name in case.floors:
            found = case.floors[contender_name](int(size), int(turns))
        else:
            found = case.measure(CONTENDERS[contender_name], int(size), int(turns))
        result: dict[str, object] = {"figures": found}
    except Cannot as error:
        result = {"cannot": str(error)}
    print(json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)  # a pool that has lost workers may not let the interpreter end
