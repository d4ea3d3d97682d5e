"""The door's own description is held against it: no server error, no answer that is not described."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doors import ServedDoor

pytestmark = pytest.mark.process

HERE = Path(__file__).parent
SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))


def test_generated_requests_get_the_answers_that_are_described(tmp_path: Path) -> None:
    with ServedDoor(tmp_path, modules=("fuzzedtasks",)) as served:
        operations = sum(len(methods) for methods in served.get("/openapi.json").json["paths"].values())
        assert operations == 10 + 6
        done = subprocess.run(
            [
                SCHEMATHESIS,
                *("--config-file", str(HERE / "schemathesis.toml")),
                *("run", f"{served.http_url}/openapi.json"),
                *("--header", f"Authorization: Bearer {served.token}"),
                *("--max-examples", "60", "--generation-deterministic"),
                "--no-color",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "default"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        # The description itself is not tested by it.
        assert f"Tested: {operations - 1}\n" in done.stdout
        found = re.search(r"(\d+) generated", done.stdout)
        assert found is not None and int(found[1]) > 500, done.stdout
        assert served.call("add", {"a": 1, "b": 2}).json == 3
        assert "Traceback" not in served.stderr()
        assert served.token is not None and served.token not in served.stderr()
