"""Arguments against schemas whose check could hold the event loop, and with it this process's lease."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from services.toolgw.adapters.json_schema import MAX_ON_LOOP_BYTES, MAX_PATTERN_CHARACTERS, JsonSchemaRules

LONG = "a" * (MAX_PATTERN_CHARACTERS + 1)

items = st.recursive(
    st.sampled_from([0, 1, 1.0, 0.0, -0.0, True, False, None, "1", "", 2**53 + 1, 1e300, 0.5]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


def unique(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"to": {"type": "array", "uniqueItems": True, **more}}}


def with_property(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}}


@given(st.lists(items, max_size=5))
def test_items_are_equal_as_for_const(given_items: list[Any]) -> None:
    """The library compares for `const` as the standard says; its own `uniqueItems` passes over some equal lists."""
    pairs = itertools.combinations(given_items, 2)
    expected = not any(Draft202012Validator({"const": one}).is_valid(other) for one, other in pairs)
    violations = asyncio.run(JsonSchemaRules().violations(unique(), {"to": given_items}))
    assert (violations == []) == expected


@pytest.mark.parametrize(
    ("same", "other"),
    [(1, 1.0), ({"a": 1, "b": 2}, {"b": 2.0, "a": 1}), ([0], [-0.0]), ({"a": [1]}, {"a": [1.0]})],
)
async def test_equal_items_are_told_with_their_places(same: Any, other: Any) -> None:
    (violation,) = await JsonSchemaRules().violations(unique(), {"to": [same, "x", other]})
    assert violation == "$.to: has non-unique elements: 0 and 2 are equal"


@pytest.mark.parametrize("different", [[1, True], [0, False], [{"a": 1}, {"a": True}], ["1", 1], [[], {}], [None, 0]])
async def test_items_of_other_types_are_not_equal(different: list[Any]) -> None:
    assert await JsonSchemaRules().violations(unique(), {"to": different}) == []


@pytest.mark.parametrize(
    "to", [[{"a": n} for n in range(6000)], [*(f"{n:x}" for n in range(6000)), 0]], ids=["objects", "mixed"]
)
async def test_many_unique_items_take_no_time_of_their_square(to: list[Any]) -> None:
    began = time.monotonic()
    assert await JsonSchemaRules().violations(unique(), {"to": to}) == []
    assert time.monotonic() - began < 3.0  # The square takes more than a minute.


async def test_large_arguments_do_not_hold_the_loop() -> None:
    """A check of a second or so, quadratic in the library itself: the heartbeats go on beside it."""
    schema = with_property({"prefixItems": [True] * 5000, "contains": True, "unevaluatedItems": False})
    arguments = {"a": list(range(9000))}
    worst = 0.0

    async def beat() -> None:
        nonlocal worst
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            worst, last = max(worst, time.monotonic() - last), time.monotonic()

    rules = JsonSchemaRules()
    await rules.violations(schema, {})
    beating = asyncio.create_task(beat())
    await asyncio.sleep(0.05)
    began = time.monotonic()
    assert await rules.violations(schema, arguments) == []
    took = time.monotonic() - began
    await asyncio.sleep(0.05)
    beating.cancel()
    assert worst < max(0.5 * took, 0.2)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"pattern": "^(a|b)*c"}, LONG),
        ({"not": {"pattern": "^b"}}, LONG),
        ({"anyOf": [{"pattern": "^b"}, {"type": "string"}]}, LONG),
        ({"propertyNames": {"pattern": "^a"}}, {LONG: 1}),
        ({"patternProperties": {"^a": True}}, {LONG: 1}),
        ({"additionalProperties": False, "patternProperties": {"^a": True}}, {LONG: 1}),
        ({"unevaluatedProperties": False, "allOf": [{"patternProperties": {"^a": True}}]}, {LONG: 1}),
    ],
)
async def test_no_expression_is_tried_on_a_long_string(schema: dict[str, Any], value: Any) -> None:
    (violation,) = await JsonSchemaRules().violations(with_property(schema), {"a": value})
    assert f"may have {MAX_PATTERN_CHARACTERS} characters at most" in violation
    assert len(violation) < 500


async def test_patterns_are_tried_on_strings_up_to_the_bound() -> None:
    rules = JsonSchemaRules()
    schema = with_property({"pattern": "^a*$"})
    assert await rules.violations(schema, {"a": LONG[1:]}) == []
    (violation,) = await rules.violations(schema, {"a": LONG[2:] + "b"})
    assert "does not match '^a*$'" in violation or violation.startswith("$.a: 'aaa")
    assert await rules.violations(with_property({"type": "string"}), {"a": LONG * 9}) == []
    assert await rules.violations({"type": "object", "additionalProperties": {"type": "string"}}, {LONG: "x"}) == []


async def test_a_quadratic_expression_is_over_soon() -> None:
    schema = with_property({"items": {"pattern": "a*b"}})
    value = [LONG[1:]] * (MAX_ON_LOOP_BYTES // len(LONG))
    began = time.monotonic()
    assert await JsonSchemaRules().violations(schema, {"a": value})
    assert time.monotonic() - began < 2.0
