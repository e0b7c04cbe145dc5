"""JSON files of a known form: written from a dataclass, and read back into it or refused in one sentence.

The form of a file is a dataclass whose fields have the types of this module. What is read has been checked whole, so
nothing that uses it looks again. Pydantic does the checking, since it also parses, limits nesting and names the place.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import core_schema, from_json

from mpo.common.files import read_named, write_json
from mpo.common.tables import printable_name
from mpo.common.words import counted, shortened
from mpo.errors import StorageError

T = TypeVar("T")

Count = Annotated[int, Field(ge=0, le=10**12)]
"""A number of things; also a seed, or an index."""

Number = Annotated[float, Field(ge=-1e12, le=1e12)]
"""A finite number whose square and sums are finite, too."""


def _check_share(value: float) -> float:
    if not -1e-9 <= value <= 1 + 1e-9:  # the mean of ones may be one and a rounding error
        raise ValueError("a share from 0 to 1")
    return value


Share = Annotated[float, AfterValidator(_check_share)]
"""Part of a whole, or a probability."""

Confidence = Annotated[float, Field(ge=1e-6, le=1 - 1e-9)]
"""Coverage of intervals."""

FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""In the annotation of a ``tuple``: the file has a list, also where another validator has been at it before."""

NO_KEY_IF_EMPTY = Field(exclude_if=lambda value: value is None or value == {})
"""In the annotation of a field: where it is None or an empty mapping, the file has no such key."""

REMEDY = "Delete it and evaluate again."


def open_mapping(*required: str, **known: Any) -> GetPydanticSchema:
    """In the annotation of ``dict[str, Any]``: the types of the keys that are known; any others are kept as they are.

    Args:
        required: The known keys that must be there.
        known: Type of each.
    """

    def schema(_: Any, handler: Any) -> Any:
        entries = {
            name: core_schema.typed_dict_field(handler.generate_schema(kind), required=name in required)
            for name, kind in known.items()
        }
        return core_schema.typed_dict_schema(entries, extra_behavior="allow")

    return GetPydanticSchema(schema)


def stored_as(form: Any, read: Callable[[Any], Any], write: Callable[[Any], Any]) -> GetPydanticSchema:
    """In the annotation of a field: its JSON has another form.

    Args:
        form: Type of what the file holds.
        read: From that to the field's value; what does not fit is a ValueError.
        write: From the field's value to that.
    """

    def schema(_: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(
            read,
            handler.generate_schema(form),
            serialization=core_schema.plain_serializer_function_ser_schema(write),
        )

    return GetPydanticSchema(schema)


def named_by_key(key: str) -> BeforeValidator:
    """In the annotation of ``dict[str, kind]``: the name of an entry is its `key`, which the file need not repeat."""

    def named(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, entry in values.items():
            if isinstance(entry, dict) and entry.get(key, name) != name:
                raise ValueError(
                    f"{name!r} as the `{key}` of {name!r}, got {shortened(repr(entry[key]), 60)}"
                )
        return {n: {**entry, key: n} if isinstance(entry, dict) else entry for n, entry in values.items()}

    return BeforeValidator(named)


def as_dict(value: Any) -> dict[str, Any]:
    """The JSON-ready form of a dataclass."""
    found: dict[str, Any] = _adapter(type(value)).dump_python(value, mode="json")  # type: ignore[arg-type]
    return found


def write_typed(path: str | Path, value: Any) -> Path:
    """Write a dataclass as JSON, atomically and without secrets.

    Raises:
        StorageError: The file cannot be written.
    """
    values = as_dict(value)
    if "provenance" in values:
        values["provenance"] = values.pop("provenance")  # last, since it is long
    return write_json(path, values)


def read_typed(path: str | Path, kind: type[T], remedy: str = REMEDY) -> T:
    """Read a JSON file of a known form.

    Args:
        path: The file.
        kind: A dataclass. A field ``version`` says which form this code knows; a file without it has version 1.
        remedy: What to do about a file that is damaged.

    Raises:
        StorageError: The file cannot be read, is no JSON, has another form, or comes from a newer version. The message
            names the file, the place in it, what was found and what was expected.
    """
    try:
        data = read_named(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}.") from None
    return parse(data.removeprefix(codecs.BOM_UTF8), kind, str(path), remedy)


def parse(data: str | bytes, kind: type[T], where: str, remedy: str = REMEDY) -> T:
    """A value from JSON; `where` is its place in the messages. See :func:`read_typed`.

    Raises:
        StorageError: It is no JSON, or has another form.
    """
    try:
        values = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise StorageError(f"{where} is no JSON: {error}. {remedy}") from None
    known = _version(kind)
    if known is not None and isinstance(values, dict):
        version = values.get("version")
        if isinstance(version, int) and version > known:
            raise StorageError(
                f"{where} has version {shortened(str(version))} of its form; this mpo reads up to version {known}. "
                "Install a newer mpo to read it."
            )
    try:
        value: T = _adapter(kind).validate_json(data, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        raise StorageError(f"{where}: {_explain(error)} {remedy}") from None
    return value


def parse_line(line: bytes, kind: type[T], where: str) -> T:
    """A row of a journal. Half a surrogate pair, which a model may have written, becomes U+FFFD.

    Raises:
        StorageError: It is no JSON, or has another form.
    """
    if b"\\ud" in line.lower():
        try:
            text = json.dumps(json.loads(line), ensure_ascii=False)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{where} is no JSON: {error}.") from None
        line = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    return parse(line, kind, where, "")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _version(kind: Any) -> int | None:
    field = getattr(kind, "__dataclass_fields__", {}).get("version")
    return None if field is None else int(field.default)


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong, and how many others are."""
    first, *others = error.errors(include_url=False, include_context=False)
    keys = [printable_name(str(key), 40) for key in first["loc"]]
    place = f"`{'.'.join(keys)}`" if keys else "it"
    expected = re.sub(r"^Input should be (?=less|greater)", "expected a number ", first["msg"])
    expected = re.sub(r"^(Input should be|Value error,)", "expected", expected)
    if first["type"] == "missing":
        text = f"{place} is missing"
    elif first["type"] == "value_error" and isinstance(first["input"], dict | list):
        text = f"{place} does not fit: {expected}"
    else:
        text = f"{place} is {_found(first['input'])}; {expected}"
    return f"{text} (and {counted(len(others), 'more fault')})." if others else f"{text}."


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return shortened(json.dumps(value, default=repr), 60)
