"""Results, JSON values, schemas and the built-in tools without a gateway."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import given
from hypothesis import strategies as st

from services.toolgw.adapters.json_schema import JsonSchemaRules, SchemaInvalid, check_schema
from services.toolgw.adapters.json_values import arguments_from, struct_of, value_of
from services.toolgw.adapters.tools_builtin import Calculate, CurrentTime
from services.toolgw.domain.invocation import Call
from services.toolgw.domain.outcome import (
    MAX_RESULT_BYTES,
    MAX_RESULT_DEPTH,
    TRUNCATED,
    Outcome,
    bounded,
    failed,
)
from soma_common.errors import InvalidRequest, reason_name

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_json_survives_the_way_through_protobuf(value: dict[str, Any]) -> None:
    assert arguments_from(Struct.FromString(struct_of(value).SerializeToString())) == value


@pytest.mark.parametrize("value", [Value(number_value=float("nan")), Value(number_value=float("-inf")), Value()])
def test_what_json_does_not_know_is_refused(value: Value) -> None:
    with pytest.raises(InvalidRequest):
        arguments_from(Struct(fields={"a": value}))


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def test_the_deepest_result_can_be_carried() -> None:
    outcome = bounded(Outcome(value=nested(MAX_RESULT_DEPTH)))
    assert outcome.failure is None
    # As deep inside other messages as a journaled step puts it.
    carried = Struct(fields={"a": value_of({"b": {"c": outcome.value}})})
    assert MessageToDict(Struct.FromString(carried.SerializeToString()))
    assert bounded(Outcome(value=nested(MAX_RESULT_DEPTH + 1))).failure is not None


def test_the_largest_result_passes_and_a_larger_one_shows_its_beginning() -> None:
    assert bounded(Outcome(value="x" * (MAX_RESULT_BYTES - 2))).failure is None
    cut = bounded(Outcome(value="x" * (MAX_RESULT_BYTES - 1)))
    assert cut.failure is not None
    assert cut.failure.message.endswith(TRUNCATED)
    assert len(cut.failure.message) < 2200


@pytest.mark.parametrize("value", [2**70, "\ud800", object()])
def test_what_json_cannot_hold_is_a_failure(value: object) -> None:
    assert bounded(Outcome(value=value)).failure is not None


def test_a_failure_passes_as_it_is() -> None:
    outcome = failed("no")
    assert bounded(outcome) is outcome


async def test_arguments_are_checked_and_each_mistake_is_placed() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 5}}, "required": ["n"]}
    rules = JsonSchemaRules()
    assert await rules.violations(schema, {"n": 5}) == []
    assert await rules.violations(schema, {}) == ["$: 'n' is a required property"]
    assert await rules.violations(schema, {"n": 6}) == ["$.n: 6 is greater than the maximum of 5"]
    assert len((await rules.violations(schema, {"n": "x" * 10_000}))[0]) < 300


async def test_no_schema_makes_the_gateway_fetch_anything() -> None:
    schema = {"type": "object", "$ref": "http://127.0.0.1:9/schema.json"}
    (violation,) = await JsonSchemaRules().violations(schema, {})
    assert "refers to what is not in it" in violation


@pytest.mark.parametrize("schema", [{}, {"type": "string"}, {"type": "object", "required": 1}])
def test_what_is_no_schema_of_an_object_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(SchemaInvalid):
        check_schema(schema)


def call(**arguments: Any) -> Call:
    return Call("demo", "helper", "chat", "s-1", "t", arguments, "k1", "", 0)


@pytest.mark.parametrize(
    ("zone", "shown"),
    [
        (None, "2030-03-31T00:59:59Z"),
        ("UTC", "2030-03-31T00:59:59Z"),
        ("Europe/Berlin", "2030-03-31T01:59:59+01:00"),
        ("Asia/Kathmandu", "2030-03-31T06:44:59+05:45"),
    ],
)
async def test_the_time_in_a_zone(zone: str | None, shown: str) -> None:
    tool = CurrentTime(lambda: datetime(2030, 3, 31, 0, 59, 59, 999_999, UTC))
    assert (await tool.run(call(**({"timezone": zone} if zone else {})))).value == shown


@pytest.mark.parametrize("zone", ["Mars/Base", "/etc/passwd", "../UTC", "Europe", "a\0b"])
async def test_what_is_no_zone_is_told(zone: str) -> None:
    failure = (await CurrentTime().run(call(timezone=zone))).failure
    assert failure is not None
    assert reason_name(failure.reason) == "TOOL_ARGUMENTS_INVALID"


async def test_arithmetic_says_when_it_rounds() -> None:
    assert (await Calculate().run(call(expression="17*23"))).value == "391"
    assert (await Calculate().run(call(expression="2/3"))).value == "0.666666666666666666666666666667 (rounded)"
