"""Records read back from their JSON data, field by field, with the place of anything that does not fit.

What a field accepts follows from its type. A field that has a default may be missing, as in reports that were written
before it came to be; a key without a field is from a later minor version, and is passed over.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from stabkit.errors import ReportError
from stabkit.report import encoding

Decoder = Callable[[Any], Any]


def decoded(cls: type, data: Any, place: str) -> Any:
    """A dataclass from an object of JSON.

    Args:
        cls: the dataclass.
        data: what ``json.loads`` returned.
        place: where it came from, for the messages.

    Raises:
        ReportError: a missing key, or a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise ReportError(f"{place}: expected an object, found {encoding.shorten(data)}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in data:
            values[field.name] = _placed(_decoders(cls)[field.name], data[field.name], f"{place}: {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ReportError(f"{place}: {field.name} is missing; the file is not whole")
    try:
        return cls(**values)
    except (ValueError, ReportError) as error:
        raise ReportError(f"{place}: {error}") from error


def _placed(decode: Decoder, value: Any, place: str) -> Any:
    try:
        return decode(value)
    except (TypeError, OverflowError) as error:
        raise ReportError(f"{place}: {error}") from error
    except ReportError as error:
        raise ReportError(f"{place}{error}") from error


@functools.cache
def _decoders(cls: type) -> dict[str, Decoder]:
    hints = get_type_hints(cls)
    return {field.name: _decoder(hints[field.name]) for field in dataclasses.fields(cls)}


_SIMPLE: dict[Any, Decoder] = {
    Any: lambda value: value,
    float: encoding.number,
    complex: encoding.complex_number,
    **{kind: functools.partial(encoding.typed, kind) for kind in (int, str, bool)},
    tuple[float, float]: encoding.interval,
}


def _decoder(hint: Any) -> Decoder:
    """What reads a value of a type."""
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return functools.partial(_inner, hint)
    parts = get_args(hint)
    if get_origin(hint) is types.UnionType and types.NoneType in parts:
        inner = _decoder(next(part for part in parts if part is not types.NoneType))
        return lambda value: None if value is None else inner(value)
    if get_origin(hint) is tuple and parts[1:] == (...,):
        return _tuple_of(parts[0])
    if get_origin(hint) is Mapping:
        item = _decoder(parts[1])
        return lambda value: {name: item(entry) for name, entry in encoding.typed(dict, value).items()}
    raise TypeError(f"a report cannot hold a {hint}")


def _inner(cls: type, value: Any) -> Any:
    return decoded(cls, value, "")


def _tuple_of(hint: Any) -> Decoder:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return functools.partial(_records, hint)
    decode = _decoder(hint)
    return lambda value: tuple(decode(item) for item in encoding.typed(list, value))


def _records(cls: type, value: Any) -> tuple[Any, ...]:
    return tuple(decoded(cls, item, f"[{index}]") for index, item in enumerate(encoding.typed(list, value)))
