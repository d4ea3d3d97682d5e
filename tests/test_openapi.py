"""The description of the door: the tasks' schemas in it, and references that lead somewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fuzzedtasks
import pytest

from acomm.errors import WIRE_ERRORS
from workers.httpreplies import STATUSES
from workers.openapi import describe
from workers.registry import Registry

PATHS = {"/", "/proxy", "/stream", "/healthz", "/readyz", "/openapi.json"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    registry = Registry(value for value in vars(fuzzedtasks).values() if hasattr(value, "schema"))
    return dict(json.loads(json.dumps(describe(registry.schemas(), token=True))))


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_task_has_a_path(document: dict[str, Any]) -> None:
    calls = {path for path in document["paths"] if path.startswith("/call/")}
    assert set(document["paths"]) - calls == PATHS
    names = "add count grow reverse moment narrow anything repeat sprout paint%20%7Bit%7D%20%26%20all".split()
    assert calls == {f"/call/{name}" for name in names}


def test_arguments_and_results(document: dict[str, Any]) -> None:
    call = document["paths"]["/call/add"]["post"]
    assert call["requestBody"]["required"]
    assert call["requestBody"]["content"]["application/json"]["schema"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 0}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert call["responses"]["200"]["content"] == {"application/json": {"schema": {"type": "integer"}}}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = list(references(document))
    assert len(found) > 20
    assert any("Tree" in reference for reference in found)
    for reference in found:
        start, *steps = reference.split("/")
        assert start == "#"
        place = document
        for step in steps:
            place = place[step]
    assert "$defs" not in json.dumps(document)


def test_types_of_one_name_in_two_tasks_stay_apart() -> None:
    def task(name: str, kind: str) -> dict[str, Any]:
        args = {"$ref": "#/$defs/Point", "$defs": {"Point": {"type": kind}}}
        return {"name": name, "args": args, "result": {}}

    document = describe([task("a", "object"), task("b", "array")], token=False)
    schemas = document["components"]["schemas"]
    kinds = []
    for name in "ab":
        schema = document["paths"][f"/call/{name}"]["post"]["requestBody"]["content"]["application/json"]
        kinds.append(schemas[schema["schema"]["$ref"].rpartition("/")[2]]["type"])
    assert kinds == ["object", "array"]


def test_the_token_is_asked_for_where_it_is_needed(document: dict[str, Any]) -> None:
    open_to_all = {
        path
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if "security" not in operation
    }
    assert open_to_all == {"/proxy", "/stream", "/healthz", "/readyz"}
    assert "security" not in json.dumps(describe([], token=False))


def test_streams_are_described_as_such(document: dict[str, Any]) -> None:
    def content(task: str) -> Any:
        return document["paths"][f"/call/{task}"]["post"]["responses"]["200"]["content"]

    assert content("repeat") == {"application/octet-stream": {}}
    (kind,) = content("sprout").items()
    assert kind[0] == "application/x-ndjson"
    assert kind[1]["x-item-schema"]["$ref"].startswith("#/components/schemas/")


def test_one_connection_too_many_may_be_the_answer_to_anything(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert "503" in operation["responses"], path


def test_every_code_has_a_status_and_every_status_is_described(document: dict[str, Any]) -> None:
    assert set(STATUSES) == set(WIRE_ERRORS)
    described = document["paths"]["/call/add"]["post"]["responses"]
    assert {str(status) for status in STATUSES.values()} <= set(described)
