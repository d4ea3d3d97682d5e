"""Callers of the HTTP door, and hooks over HTTP, on the standard library: nothing of acomm is in them."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from peers import WAIT, ack
from serving import Served

JSON = {"Content-Type": "application/json"}
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'",
}


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["Content-Type"] == "application/json", self
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer that is one."""
        assert list(self.json) == ["error"], self
        error: dict[str, Any] = self.json["error"]
        return error


class Caller:
    """Sends HTTP requests to a door at `http_url`, with its token unless told otherwise."""

    def __init__(self, http_url: str, token: str | None) -> None:
        self.http_url = http_url
        self.token = token
        self.port = urlsplit(http_url).port or 80
        self.host = urlsplit(http_url).hostname or ""

    def headers(self, token: bool = True, **more: str) -> dict[str, str]:
        shown = {"Authorization": f"Bearer {self.token}"} if token and self.token else {}
        return {**shown, **{name.replace("_", "-"): value for name, value in more.items()}}

    def open(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[HTTPConnection, HTTPResponse]:
        connection = HTTPConnection(self.host, self.port, timeout=WAIT)
        connection.request(method, path, body, headers or {})
        return connection, connection.getresponse()

    def send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Exactly these headers, besides Host and Content-Length."""
        connection, reply = self.open(method, path, body, headers)
        try:
            return Reply(reply.status, dict(reply.headers.items()), reply.read())
        finally:
            connection.close()

    def get(self, path: str, *, token: bool = True, **more: str) -> Reply:
        return self.send("GET", path, None, self.headers(token, **more))

    def call(self, task: str, args: Any = None, *, query: str = "", token: bool = True, **more: str) -> Reply:
        """POST /call/TASK with `args` as JSON, or bytes as they are."""
        body = args if isinstance(args, bytes) else json.dumps(args).encode()
        return self.send("POST", f"/call/{task}{query}", body, {**JSON, **self.headers(token, **more)})

    def post(self, body: bytes, *, token: bool = True, path: str = "/", **more: str) -> Reply:
        """A message at `path`, as the original in Go sends it."""
        go = {"User-Agent": "Go-http-client/1.1", "Accept-Encoding": "gzip"}
        return self.send("POST", path, body, {**JSON, **go, **self.headers(token, **more)})

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), WAIT)

    def raw(self, data: bytes) -> bytes:
        """What comes back for these very bytes, until the door closes."""
        with self.connect() as sock:
            sock.sendall(data)
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
            return answer


class ServedDoor(Served, Caller):
    """A supervisor with a door at any free port of the loopback."""

    def __init__(self, folder: Path, *arguments: str, modules: tuple[str, ...] = ("servedtasks",)) -> None:
        if "--http" not in arguments:
            arguments = ("--http", "127.0.0.1:0", *arguments)
        Served.__init__(self, folder, *arguments, modules=modules)
        token = folder / "s.sock.token"
        shown = token.read_text().strip() if token.exists() else None
        Caller.__init__(self, self.stats()["http"]["url"], shown)


class HttpHook:
    """A response hook over HTTP; `next()` is the path and the body of what was posted to it."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        received: queue.Queue[tuple[str, bytes]] = queue.Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = ack()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                received.put((self.path, body))

            def log_message(self, *args: object) -> None:
                pass

        self._received = received
        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def next(self) -> tuple[str, dict[str, Any]]:
        path, body = self._received.get(timeout=WAIT)
        return path, json.loads(body)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT)
