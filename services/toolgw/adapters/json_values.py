"""Between protobuf's `Struct` and `Value` and plain JSON values.

protobuf has one kind of number, so 17 arrives as 17.0: whole numbers become integers again, as whoever wrote them
meant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from google.protobuf.struct_pb2 import ListValue, NullValue, Struct, Value

from services.toolgw.domain.refusals import invalid_field
from services.toolgw.domain.tool import Json

EXACT_INTEGERS: Final = 2**53
"""Below this every whole number has a double of its own."""


def arguments_from(struct: Struct) -> dict[str, Json]:
    """The arguments of a call.

    Raises:
        InvalidRequest: they hold what JSON does not know: NaN, an infinity, or a value that is none.
    """
    return {name: _plain(value) for name, value in struct.fields.items()}


def struct_of(mapping: Mapping[str, Json]) -> Struct:
    """A JSON object as `Struct`."""
    return Struct(fields={name: value_of(item) for name, item in mapping.items()})


def value_of(item: Json) -> Value:
    """A JSON value as `Value`; integers beyond 2**53 lose their last digits, as in every JSON reader that knows
    doubles."""
    match item:
        case None:
            return Value(null_value=NullValue.NULL_VALUE)
        case bool():
            return Value(bool_value=item)
        case int() | float():
            return Value(number_value=item)
        case str():
            return Value(string_value=item)
        case Mapping():
            return Value(struct_value=struct_of(item))
        case _:
            return Value(list_value=ListValue(values=[value_of(part) for part in item]))


def _plain(value: Value) -> Json:
    match value.WhichOneof("kind"):
        case "null_value":
            return None
        case "bool_value":
            return value.bool_value
        case "number_value":
            return _number(value.number_value)
        case "string_value":
            return value.string_value
        case "struct_value":
            return arguments_from(value.struct_value)
        case "list_value":
            return [_plain(part) for part in value.list_value.values]
        case _:
            raise invalid_field("arguments", "a value is missing: send null for nothing")


def _number(number: float) -> int | float:
    if not math.isfinite(number):
        raise invalid_field("arguments", f"{number} is no JSON number")
    return int(number) if number.is_integer() and abs(number) < EXACT_INTEGERS else number
