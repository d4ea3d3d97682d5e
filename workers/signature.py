"""From JSON arguments to a call and back: the parameters of a task, as its type hints declare them.

`Parameters` is built once a task and then binds the raw arguments of each call. One msgspec decode
into a generated struct is the fast path; whatever does not fit it takes the slow path, which reads
the arguments one by one and so can say which of them is wrong. Both give the same answer.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Raw
from msgspec.structs import astuple

from acomm.errors import BadArgs, ConfigError, printable
from acomm.jsontext import encode

RawArgs = bytes | memoryview | Raw | None
Bound = tuple[tuple[Any, ...], dict[str, Any]]

_OBJECT, _ARRAY = ord("{"), ord("[")
_BLANK = b" \t\r\n"
_JSON_TYPES = (dict, list, str, int, float, bool, type(None))
_decode_object = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_array = msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.Encoder().encode


class Parameters:
    """The parameters of `function`, which is served as `task` and stands at `place` ("file.py:12").

    Raises ConfigError, naming task, place and parameter, for a hint that does not resolve and for
    one that no JSON value could satisfy.
    """

    def __init__(self, function: Callable[..., Any], task: str, place: str) -> None:
        self._where = f"task {task}"
        try:
            signature = inspect.signature(function)
            hints = type_hints(function)
        except Exception as error:
            raise ConfigError(
                f"task {task} ({place}): its type hints cannot be read: {_describe(error)}"
            ) from error
        self._signature = signature
        self._result_hint = hints.get("return", Any)
        parameters = list(signature.parameters.values())
        self._positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self._positional_only = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
        self._keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        self._named = {p.name: p for p in self._positional + self._keyword_only}
        self._var_positional = next((p for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        self._var_keyword = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self._hints = {p.name: hints.get(p.name, Any) for p in parameters}
        self._decoders = {p.name: self._decoder(p, f"task {task} ({place})") for p in parameters}
        self._whole = self._whole_object_fields()
        self._names = tuple(self._named)
        self._by_name = self._by_position = None
        if not (self._positional_only or self._var_keyword or self._whole):
            self._by_name = self._struct_decoder(self._named.values(), array=False)
        if not self._var_positional and not any(_required(p) for p in self._keyword_only):
            self._by_position = self._struct_decoder(self._positional, array=True)

    def bind(self, raw: RawArgs) -> Bound:
        """The positional and keyword arguments that `raw` (JSON, or nothing) stands for.

        Raises BadArgs with one line that names task, parameter and fault. Parameters that are not
        given are left out, so that the function's own defaults apply.
        """
        data = raw if isinstance(raw, bytes | memoryview) else b"" if raw is None else memoryview(raw)
        first = data[0] if data else 0
        try:
            if first == _OBJECT and self._by_name is not None:
                values = astuple(self._by_name.decode(data))
                return (), {n: v for n, v in zip(self._names, values, strict=True) if v is not UNSET}
            if first == _ARRAY and self._by_position is not None:
                return tuple(v for v in astuple(self._by_position.decode(data)) if v is not UNSET), {}
        except Exception:
            # The slow path fails on the same input and knows how to say why. Not only MsgspecError:
            # the hooks of the user's own types run in there.
            return self._bind_one_by_one(data)
        return self._bind_one_by_one(data)

    def check(self, raw: RawArgs) -> None:
        """Raises BadArgs unless `bind` would succeed; takes half its time."""
        data = raw if isinstance(raw, bytes | memoryview) else b"" if raw is None else memoryview(raw)
        first = data[0] if data else 0
        decoder = self._by_position if first == _ARRAY else self._by_name if first == _OBJECT else None
        if decoder is None:
            self._bind_one_by_one(data)
            return
        try:
            decoder.decode(data)
        except Exception:  # for the same reason as in `bind`
            self._bind_one_by_one(data)

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The JSON arguments of the call `function(*args, **kwargs)`, as `bind` reads them.

        An object wherever every argument can go by name, else an array. Raises TypeError as a call
        of the function would, and for a value that JSON cannot express, naming the parameter.
        """
        try:
            given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self._where}: {error}") from None
        rest = given.pop(self._var_positional.name, ()) if self._var_positional else ()
        extra = given.pop(self._var_keyword.name, {}) if self._var_keyword else {}
        if clash := extra.keys() & self._named.keys():
            raise TypeError(f"{self._where}: {', '.join(sorted(clash))} would be given twice in JSON")
        if rest:
            if extra or any(p.name in given for p in self._keyword_only):
                raise TypeError(f"{self._where}: an array cannot carry keywords beside *{self._rest_name()}")
            values = [self._encode(p.name, given[p.name]) for p in self._positional]
            return _array(values + [self._encode(self._rest_name(), value) for value in rest])
        if self._whole:
            return self._encode_whole(*given.items()) if given else b"[]"
        fields = {**given, **extra}
        return b"{%s}" % b",".join(self._encode(n, n) + b":" + self._encode(n, v) for n, v in fields.items())

    @functools.cached_property
    def result_decoder(self) -> msgspec.json.Decoder[Any]:
        """Decodes a result by the return hint; plain JSON where there is none that JSON can express."""
        return _decoder_of(self._result_hint)

    @functools.cached_property
    def item_decoder(self) -> msgspec.json.Decoder[Any]:
        """Likewise for an item of the stream of a generator function."""
        return _decoder_of(_item_hint(self._result_hint))

    def args_schema(self) -> dict[str, Any]:
        """JSON Schema of the arguments given as an object; never raises."""
        if self._whole:
            return json_schema(next(iter(self._hints.values())))
        names = [*self._names, *([self._var_keyword.name] if self._var_keyword else [])]
        try:
            found, components = msgspec.json.schema_components([self._hints[n] for n in names])
            schemas = dict(zip(names, found, strict=True))
        except Exception:
            # One type that has no schema hides those of the others: ask for each by itself.
            components = {}
            schemas = {name: json_schema(self._hints[name]) for name in names}
        schema: dict[str, Any] = {"type": "object"}
        schema["properties"] = {n: _with_default(schemas[n], p) for n, p in self._named.items()}
        schema["required"] = [n for n, p in self._named.items() if _required(p)]
        schema["additionalProperties"] = schemas[self._var_keyword.name] if self._var_keyword else False
        return {**schema, "$defs": components} if components else schema

    def result_schema(self) -> dict[str, Any]:
        """JSON Schema of the result by the return hint, or an empty one; never raises."""
        return json_schema(self._result_hint)

    @functools.cached_property
    def stream_format(self) -> str:
        """What the stream of a generator function is made of, by its return hint: "bytes" or "lines"."""
        return "bytes" if _is_binary(_item_hint(self._result_hint)) else "lines"

    def stream_schema(self) -> dict[str, Any]:
        """The format of a generator function's stream, and the JSON Schema of its lines; never raises."""
        if self.stream_format == "bytes":
            return {"format": "bytes"}
        return {"format": "lines", "items": json_schema(_item_hint(self._result_hint))}

    # Building

    def _decoder(self, parameter: inspect.Parameter, where: str) -> msgspec.json.Decoder[Any]:
        hint = self._hints[parameter.name]
        try:
            info = msgspec.inspect.type_info(hint)
            decoder = msgspec.json.Decoder(hint)
        except Exception as error:
            raise ConfigError(f"{where}: parameter {parameter.name}: {_describe(error)}") from error
        # A parameter that may be left out can still be of use to callers in Python.
        alien = _inexpressible(info) if _required(parameter) else None
        if alien is not None:
            raise ConfigError(
                f"{where}: parameter {parameter.name}: JSON cannot express {_type_name(alien)}; "
                "take a type of JSON, a dataclass or a msgspec.Struct, or give it a default"
            )
        return decoder

    def _struct_decoder(
        self, parameters: Iterable[inspect.Parameter], *, array: bool
    ) -> msgspec.json.Decoder[Any]:
        fields: list[Any] = []
        rename = {}
        for number, p in enumerate(parameters):
            # Numbered, as a parameter may have a name that a struct's own attributes need.
            field = f"f{number}"
            rename[field] = p.name
            hint = self._hints[p.name]
            fields.append((field, hint) if _required(p) else (field, hint, UNSET))
        struct = msgspec.defstruct(
            "Arguments",
            fields,
            rename=rename,
            array_like=array,
            kw_only=not array,
            forbid_unknown_fields=True,
        )
        return msgspec.json.Decoder(struct)

    def _whole_object_fields(self) -> frozenset[str]:
        """The keys of the one parameter that takes the whole object; empty if there is none such."""
        if len(self._named) != 1 or self._var_positional or self._var_keyword:
            return frozenset()
        return _object_keys(msgspec.inspect.type_info(next(iter(self._hints.values()))))

    # Binding, the slow path

    def _bind_one_by_one(self, raw: bytes | memoryview) -> Bound:
        data = bytes(raw).strip(_BLANK)
        try:
            if data[:1] == b"{":
                named = _decode_object(data)
                if self._whole and (named.keys() != self._named.keys() or self._names[0] in self._whole):
                    named = {self._names[0]: Raw(data)}
                return self._bind_named(named)
            if data[:1] == b"[":
                return self._bind_listed(_decode_array(data))
        except BadArgs:
            raise
        except Exception as error:
            raise self._bad(f"the arguments are not valid JSON: {_describe(error)}") from None
        return self._bind_listed([] if data in (b"", b"null") else [Raw(data)])

    def _bind_named(self, named: Mapping[str, Raw]) -> Bound:
        unexpected = [name for name in named if name not in self._named]
        if unexpected and self._var_keyword is None:
            names = ", ".join(printable(name, 50) for name in unexpected[:3])
            takes = ", ".join(self._names) or "no arguments"
            raise self._bad(f"unexpected {_arguments(unexpected)} {names}; it takes {takes}")
        self._check_missing(p for p in self._named.values() if p.name not in named)
        extra = self._var_keyword.name if self._var_keyword else ""
        values = {n: self._value(n, raw, n if n in self._named else extra) for n, raw in named.items()}
        if not self._positional_only:
            return (), values
        # JSON has no positional-only keys, so these go by name too; a gap takes its default.
        last = max((i for i, p in enumerate(self._positional_only) if p.name in values), default=-1)
        return tuple(values.pop(p.name, p.default) for p in self._positional_only[: last + 1]), values

    def _bind_listed(self, items: list[Raw]) -> Bound:
        most = len(self._positional)
        if len(items) > most and self._var_positional is None:
            least = sum(map(_required, self._positional))
            count = str(most) if least == most else f"{least} to {most}"
            noun = "positional argument" if self._keyword_only else "argument"
            raise self._bad(f"takes {count} {noun}{'' if most == 1 else 's'}, got {len(items)}")
        self._check_missing([*self._positional[len(items) :], *self._keyword_only])
        names = [p.name for p in self._positional[: len(items)]]
        values = [self._value(name, item, name) for name, item in zip(names, items, strict=False)]
        if len(items) > most:
            rest = self._rest_name()
            values += [self._value(f"{rest}[{i}]", item, rest) for i, item in enumerate(items[most:])]
        return tuple(values), {}

    def _check_missing(self, absent: Iterable[inspect.Parameter]) -> None:
        missing = [p.name for p in absent if _required(p)]
        if missing:
            raise self._bad(f"missing {_arguments(missing)} {', '.join(missing)}")

    def _value(self, name: str, raw: Raw, parameter: str) -> Any:
        try:
            return self._decoders[parameter].decode(raw)
        except Exception as error:
            text, path = _split_path(error)
            raise self._bad(f"argument {printable(name, 50)}{printable(path)}: {text}") from None

    def _bad(self, text: str) -> BadArgs:
        return BadArgs(f"{self._where}: {text}")

    def _rest_name(self) -> str:
        return self._var_positional.name if self._var_positional else ""

    # Encoding

    def _encode(self, name: str, value: Any) -> bytes:
        return encode(value, f"{self._where}: argument {name}")

    def _encode_whole(self, item: tuple[str, Any]) -> bytes:
        data = self._encode(*item)
        if data.startswith(b"{"):
            return data
        return b"{%s:%s}" % (_encode(item[0]), data) if self._keyword_only else _array([data])


def type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The resolved hints of any callable, with `Annotated` kept."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function) and not hasattr(function, "__annotations__"):
        function = type(function).__call__
    return typing.get_type_hints(function, include_extras=True)


def json_schema(hint: Any) -> dict[str, Any]:
    """JSON Schema of a type; empty, which allows anything, for one that has none."""
    try:
        return msgspec.json.schema(hint)
    except Exception:
        return {}


def _decoder_of(hint: Any) -> msgspec.json.Decoder[Any]:
    try:
        if _inexpressible(msgspec.inspect.type_info(hint)) is None:
            return msgspec.json.Decoder(hint)
    except Exception:
        # The hint is the author's remark, not a contract with the caller: serve without it.
        return msgspec.json.Decoder()
    return msgspec.json.Decoder()


_STREAMS = (
    abc.Iterator, abc.Iterable, abc.Generator, abc.AsyncIterator, abc.AsyncIterable, abc.AsyncGenerator
)  # fmt: skip


def _item_hint(hint: Any) -> Any:
    """What a generator function yields, by its return hint."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint)[0] if typing.get_origin(hint) in _STREAMS else Any


def _is_binary(hint: Any) -> bool:
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(map(_is_binary, typing.get_args(hint)))
    return hint in (bytes, bytearray, memoryview)


def _inexpressible(info: Any, seen: frozenset[int] = frozenset()) -> type | None:
    """A class within the described type that no JSON value is an instance of and that must be given."""
    inspect_ = msgspec.inspect
    if isinstance(info, inspect_.CustomType):
        try:
            fits = any(issubclass(kind, info.cls) for kind in _JSON_TYPES)
        except TypeError:
            fits = False
        return None if fits else info.cls
    if id(info) in seen:
        return None
    seen |= {id(info)}
    parts: list[Any] = [getattr(info, name, None) for name in ("type", "item_type", "key_type", "value_type")]
    parts += getattr(info, "item_types", ())
    parts += [field.type for field in getattr(info, "fields", ()) if field.required]
    if isinstance(info, inspect_.UnionType):
        found = [_inexpressible(choice, seen) for choice in info.types if choice != inspect_.NoneType()]
        return found[0] if found and None not in found else None
    return next((cls for part in parts if (cls := _inexpressible(part, seen)) is not None), None)


def _object_keys(info: Any) -> frozenset[str]:
    """The keys of a type whose values are JSON objects with known keys, or of a union of such."""
    inspect_ = msgspec.inspect
    while isinstance(info, inspect_.Metadata):
        info = info.type
    if isinstance(info, inspect_.UnionType):
        choices = [_object_keys(choice) for choice in info.types if choice != inspect_.NoneType()]
        return frozenset().union(*choices) if all(choices) else frozenset()
    if isinstance(info, inspect_.StructType) and not info.array_like:
        # The empty key keeps a type without fields apart from a type that is no object.
        return frozenset({field.encode_name for field in info.fields} | {info.tag_field or ""})
    if isinstance(info, inspect_.DataclassType | inspect_.TypedDictType):
        return frozenset({field.encode_name for field in info.fields} | {""})
    return frozenset()


def _with_default(schema: dict[str, Any], parameter: inspect.Parameter) -> dict[str, Any]:
    if _required(parameter):
        return schema
    try:
        return {**schema, "default": msgspec.json.decode(encode(parameter.default, ""))}
    except Exception:
        return schema


def _required(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variable


def _split_path(error: Exception) -> tuple[str, str]:
    """msgspec's "Expected `int`, got `str` - at `$.a`" as ("expected int, got str", ".a")."""
    text, at, path = str(error).rpartition(" - at `$")
    if not at or isinstance(error, RecursionError):
        return _describe(error), ""
    return _tidy(text), path.removesuffix("`")


def _describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    return _tidy(str(error)) or type(error).__name__


def _tidy(text: str) -> str:
    text = printable(text.replace("`", ""))
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _arguments(names: list[str]) -> str:
    return "argument" if len(names) == 1 else "arguments"


def _array(values: list[bytes]) -> bytes:
    return b"[%s]" % b",".join(values)


def _type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
