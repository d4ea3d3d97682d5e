"""Tasks of many types, for tools that make up arguments from a description. None of them can fail."""

from __future__ import annotations

import datetime
import enum
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec

from workers import task


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Leaf(msgspec.Struct):
    name: str
    weight: float = 1.0


class Tree(msgspec.Struct):
    leaves: list[Leaf]
    left: Tree | None = None
    right: Tree | None = None


@task
def add(a: int, b: int = 0) -> int:
    return a + b


@task
def count(tree: Tree) -> int:
    """A task whose one parameter takes the whole object."""
    below = [side for side in (tree.left, tree.right) if side is not None]
    return len(tree.leaves) + sum(count(side) for side in below)


@task
def grow(tree: Tree, leaf: Leaf) -> Tree:
    return Tree([*tree.leaves, leaf], tree.left, tree.right)


@task(name="paint {it} & all")
def paint(colour: Colour, shade: Literal["dark", "light"] = "dark") -> Colour:
    return colour


@task
def reverse(data: bytes) -> bytes:
    return data[::-1]


@task
def moment(when: datetime.datetime, id: uuid.UUID | None = None) -> dict[str, Any]:
    return {"when": when, "id": id}


@task
def narrow(percent: Annotated[int, msgspec.Meta(ge=0, le=100)], names: list[str] | None = None) -> str:
    return f"{percent} % of {len(names or ())}"


@task
def anything(*values: Any, **named: Any) -> list[Any]:
    return [list(values), named]


@task
def repeat(text: str) -> Iterator[bytes]:
    for _ in range(3):
        yield text.encode("utf-8", "replace")


@task
def sprout(names: list[str]) -> Iterator[Leaf]:
    yield from map(Leaf, names)
