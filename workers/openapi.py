"""The HTTP door described as OpenAPI 3.1, made from the tasks' own schemas. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from acomm.errors import WIRE_ERRORS

_DEFS = "#/$defs/"
_COMPONENTS = "#/components/schemas/"
_not_in_names = re.compile(r"[^A-Za-z0-9._-]")

_STATUSES = {
    400: "The request could not be understood: its HTTP, its JSON, an option, the content type.",
    401: "The token is missing or wrong.",
    403: "Not for this Host or Origin, or not for this caller.",
    404: "There is no such task, path or stream.",
    405: "Another method is for this path; see Allow.",
    409: "The call was cancelled, or its id belongs to another one.",
    413: "The body or the result is larger than the limit.",
    422: "The arguments do not fit, the task raised, a time limit has passed, or the call kills workers.",
    429: "No more work is taken now; see Retry-After.",
    503: "The service is stopping, or has too many connections, or the worker died.",
}
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    405: {"Allow": {"schema": {"type": "string"}}},
    429: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}},
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"enum": [*WIRE_ERRORS, "error"]},
                "message": {"type": "string"},
                "type": {"type": "string", "description": "The class that the task raised."},
                "traceback": {"type": "string"},
                "receipt": {
                    "type": "object",
                    "description": "What is known of the end of the worker, and of the call in it.",
                },
                "retry_after": {"type": "number", "description": "Seconds."},
            },
        }
    },
}
_URL = {
    "description": "A Go url.URL, or its text.",
    "anyOf": [
        {"type": "null"},
        {"type": "string"},
        {"type": "object", "properties": {"Scheme": {"type": "string"}, "Path": {"type": "string"}}},
    ],
}
_REQUEST = {
    "type": "object",
    "description": "A request as on the unix socket, in any generation.",
    "required": ["id", "task"],
    "properties": {
        "id": {"type": "string", "minLength": 1, "maxLength": 1024},
        "task": {"type": "string", "minLength": 1, "maxLength": 255},
        "args": {},
        "responseHook": {"$ref": _COMPONENTS + "URL"},
        "taskURL": {"$ref": _COMPONENTS + "URL"},
        "streamURL": {"$ref": _COMPONENTS + "URL"},
        "timeout": {"type": "number", "exclusiveMinimum": 0, "description": "Seconds."},
        "priority": {"type": "integer"},
        "acomm": {"const": 1, "description": "The sender understands extensions."},
    },
}
_RESPONSE = {
    "type": "object",
    "description": "A response, and the form of every acknowledgement.",
    "required": ["error", "id", "result"],
    "properties": {
        "error": {"type": "string", "description": "Empty: there is none."},
        "id": {"type": "string"},
        "result": {},
        "streamURL": {"$ref": _COMPONENTS + "URL"},
        "stream_url": {"$ref": _COMPONENTS + "URL"},
        "error_info": {"$ref": _COMPONENTS + "Error/properties/error"},
        "acomm": {"const": 1},
    },
}
_OPTIONS = [
    {
        "name": "timeout",
        "in": "query",
        "description": "Seconds, queueing included.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    {
        "name": "priority",
        "in": "query",
        "description": "Higher goes first.",
        "schema": {"type": "integer", "minimum": -(2**31) + 1, "maximum": 2**31 - 1},
    },
]
STREAM_TYPES = {"lines": "application/x-ndjson", "bytes": "application/octet-stream"}


def describe(tasks: Iterable[Mapping[str, Any]], *, token: bool) -> dict[str, Any]:
    """The document for `tasks`, as `Task.schema` gives them. `token`: whether callers show one."""
    schemas: dict[str, Any] = {"Error": _ERROR, "URL": _URL, "Request": _REQUEST, "Response": _RESPONSE}
    # A task's name may hold what a component's may not, so the number keeps two of them apart.
    calls = {
        f"/call/{quote(task['name'], safe='')}": {"post": _call(task, f"task{number}", schemas)}
        for number, task in enumerate(tasks, 1)
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "acomm", "version": version("acomm")},
        "paths": {**calls, **_fixed_paths()},
        "components": {"schemas": schemas},
    }
    if token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            if path.startswith("/call/") or path in ("/", "/openapi.json"):
                for operation in methods.values():
                    operation["security"] = [{"token": []}]
    return document


def _call(task: Mapping[str, Any], prefix: str, schemas: dict[str, Any]) -> dict[str, Any]:
    args = _hoisted(task["args"], f"{prefix}.args", schemas)
    stream = task.get("stream")
    if stream is None:
        content = {"application/json": {"schema": _hoisted(task["result"], f"{prefix}.result", schemas)}}
    else:
        content = {STREAM_TYPES[stream["format"]]: {}}
        if "items" in stream:  # of which this version of OpenAPI has no word
            items = _hoisted(stream["items"], f"{prefix}.item", schemas)
            content[STREAM_TYPES[stream["format"]]]["x-item-schema"] = items
    return {
        "summary": task.get("doc") or task["name"],
        "operationId": f"call {task['name']}",
        "parameters": _OPTIONS,
        "requestBody": {
            "required": bool(task["args"].get("required")),
            "description": "Keyword arguments; or an array of positional ones.",
            "content": {"application/json": {"schema": args}},
        },
        "responses": {"200": {"description": "The result.", "content": content}, **_errors(*_STATUSES)},
    }


def _fixed_paths() -> dict[str, Any]:
    response = {"application/json": {"schema": {"$ref": _COMPONENTS + "Response"}}}
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "/": {
            "post": {
                "summary": "Send a request; its response goes to its hook.",
                "requestBody": _body("Request"),
                "responses": {
                    "200": {"description": "The acknowledgement, refusals included.", "content": response},
                    **_errors(400, 503),
                },
            }
        },
        "/proxy": {
            "post": {
                "summary": "The response of a service elsewhere to a request that was passed on to it.",
                "parameters": [{"name": "key", "in": "query", "schema": {"type": "string"}}],
                "requestBody": _body("Response"),
                "responses": {
                    "200": {"description": "The acknowledgement.", "content": response},
                    **_errors(400, 403, 413, 429, 503),
                },
            }
        },
        "/stream": {
            "get": {
                "summary": "A stream, by the signed URL that a response gave. Each is good once.",
                "parameters": [
                    {"name": name, "in": "query", "required": True, "schema": {"type": "string"}}
                    for name in ("addr", "expires", "nonce", "sig")
                ],
                "responses": {
                    "200": {"description": "All of it.", "content": {"application/octet-stream": {}}},
                    **_errors(400, 404, 503),
                    "403": {
                        "description": "The URL is not signed, has expired or was used; or as elsewhere.",
                        "content": {**text, **_error_content()},
                    },
                },
            }
        },
        "/healthz": {
            "get": {
                "summary": "Whether the process lives.",
                "responses": {"200": {"description": "It does.", "content": text}, **_errors(400, 403, 503)},
            }
        },
        "/readyz": {
            "get": {
                "summary": "Whether work is taken.",
                "responses": {
                    "200": {"description": "It is.", "content": text},
                    "503": {"description": "It is not: why.", "content": text},
                    **_errors(400, 403),
                },
            }
        },
        "/openapi.json": {
            "get": {
                "summary": "This document.",
                "responses": {
                    "200": {
                        "description": "It.",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    },
                    **_errors(400, 401, 403, 503),
                },
            }
        },
    }


def _body(schema: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": {"$ref": _COMPONENTS + schema}}}}


def _error_content() -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _COMPONENTS + "Error"}}}


def _errors(*statuses: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status in statuses:
        found[str(status)] = {"description": _STATUSES[status], "content": _error_content()}
        if status in _HEADERS:
            found[str(status)]["headers"] = _HEADERS[status]
    return found


def _hoisted(schema: Mapping[str, Any], prefix: str, schemas: dict[str, Any]) -> Any:
    """The schema with its `$defs` among the document's components, and its references led there."""
    definitions: Mapping[str, Any] = schema.get("$defs", {})
    names = {name: f"{prefix}.{_not_in_names.sub('_', name)}" for name in definitions}
    for name, definition in definitions.items():
        schemas[names[name]] = _redirected(definition, names)
    return _redirected({key: value for key, value in schema.items() if key != "$defs"}, names)


def _redirected(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_redirected(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: f"{_COMPONENTS}{names[item.removeprefix(_DEFS)]}"
        if key == "$ref" and isinstance(item, str) and item.removeprefix(_DEFS) in names
        else _redirected(item, names)
        for key, item in value.items()
    }
