"""JSON Schema (2020-12) as the rules for arguments.

The library takes 7 MB and a tenth of a second: it is loaded when something is checked for the first time, so that a
tool gateway without work does without it.

Arguments come from a model, and the event loop that checks them also renews this process's lease. So no check may hold
the loop:

- Small arguments (`MAX_ON_LOOP_BYTES`) are checked on the loop, others in a thread.
- A regular expression holds the interpreter wherever it runs, and its time may grow with the square of what it is tried
  on: `pattern`, `patternProperties` and what is built on them are not tried on strings longer than
  `MAX_PATTERN_CHARACTERS`. Such a string is refused, also where the schema wants what does not match.
- `uniqueItems` takes time in proportion to the arguments, whatever the items are.

What remains is the schema author's: an expression that is worse than quadratic, such as `(a+)+$`, takes its time with
short strings too. And checks of large arguments wait for each other, those of all tenants.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import orjson

from services.toolgw.domain.tool import Json

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

SHOWN_VIOLATIONS: Final = 8
SHOWN_CHARACTERS: Final = 200
MAX_ON_LOOP_BYTES: Final = 4096
"""Largest arguments, as JSON, that are checked on the event loop."""
MAX_PATTERN_CHARACTERS: Final = 2048
"""Longest string that a regular expression is tried on: the longest addresses in use have as many, and names, dates and
ids far less. A quadratic expression takes a few hundredths of a second with it."""
CHECKING_THREADS: Final = 2


class SchemaInvalid(ValueError):
    """A tool's `parameters` are no JSON Schema of an object; the text says where."""


class _NotChecked(Exception):
    """A string is too long for a regular expression. No ValidationError: inside `not` that would be a success."""


class JsonSchemaRules:
    """Validators, made once per schema. References to other documents are not followed: nothing is fetched."""

    def __init__(self) -> None:
        self._validators: dict[bytes, Draft202012Validator] = {}
        self._threads = ThreadPoolExecutor(CHECKING_THREADS, thread_name_prefix="arguments")

    async def violations(self, parameters: Mapping[str, Json], arguments: Mapping[str, Json]) -> Sequence[str]:
        """What does not fit, each with its place; empty when everything does."""
        if not self._validators:
            await asyncio.to_thread(import_module, "jsonschema")
        validator = self._validator(parameters)  # On the loop: only it touches the validators kept.
        if len(orjson.dumps(arguments)) <= MAX_ON_LOOP_BYTES:
            return _violations(validator, arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, _violations, validator, arguments)

    def _validator(self, parameters: Mapping[str, Json]) -> Draft202012Validator:
        from referencing import Registry

        digest = orjson.dumps(parameters, option=orjson.OPT_SORT_KEYS)
        validator = self._validators.get(digest)
        if validator is None:
            registry: Registry[Any] = Registry()
            validator = self._validators[digest] = _validator_class()(dict(parameters), registry=registry)
        return validator


def check_schema(parameters: Mapping[str, Json]) -> None:
    """Refuse what is not a JSON Schema of an object.

    Raises:
        SchemaInvalid: it is not.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if parameters.get("type") != "object":
        raise SchemaInvalid('must have "type": "object": a model calls tools with named arguments')
    try:
        Draft202012Validator.check_schema(dict(parameters))
    except SchemaError as error:
        raise SchemaInvalid(f"{error.json_path}: {error.message}") from error


def _violations(validator: Draft202012Validator, arguments: Mapping[str, Json]) -> Sequence[str]:
    from referencing.exceptions import Unresolvable

    try:
        found = list(itertools.islice(validator.iter_errors(dict(arguments)), SHOWN_VIOLATIONS))
    except Unresolvable as error:
        return [f"the tool's own schema refers to what is not in it: {error}"]
    except _NotChecked as error:
        return [str(error)]
    return [f"{error.json_path}: {error.message[:SHOWN_CHARACTERS]}" for error in found]


@cache
def _validator_class() -> Any:
    """The library's validator, with keywords whose time is bounded."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    library = Draft202012Validator.VALIDATORS

    def pattern(validator: Any, expression: str, instance: Json, schema: Json) -> Iterator[ValidationError]:
        if isinstance(instance, str):
            _refuse_long([instance], expression)
        yield from library["pattern"](validator, expression, instance, schema) or ()

    def names(keyword: str) -> Any:
        """A keyword that tries expressions on the names of an object's properties."""

        def check(validator: Any, value: Json, instance: Json, schema: Json) -> Iterator[ValidationError]:
            expressions = schema.get("patternProperties", {})
            if isinstance(instance, dict) and (expressions or keyword == "unevaluatedProperties"):
                _refuse_long(instance, " or ".join(expressions))
            yield from library[keyword](validator, value, instance, schema) or ()

        return check

    properties = ("patternProperties", "additionalProperties", "unevaluatedProperties")
    keywords = {"pattern": pattern, "uniqueItems": _unique_items, **{name: names(name) for name in properties}}
    return extend(Draft202012Validator, keywords)  # type: ignore[no-untyped-call]  # no types for it


def _refuse_long(strings: Iterable[str], expression: str) -> None:
    for string in strings:
        if len(string) > MAX_PATTERN_CHARACTERS:
            what = f"the pattern {expression[:SHOWN_CHARACTERS]!r}" if expression else "the names of its properties"
            raise _NotChecked(
                f"the string of {len(string)} characters that begins with {string[:40]!r} is checked against {what}:"
                f" such strings may have {MAX_PATTERN_CHARACTERS} characters at most"
            )


def _unique_items(validator: Any, is_wanted: bool, instance: Json, schema: Json) -> Iterator[ValidationError]:
    from jsonschema import ValidationError

    if not is_wanted or not isinstance(instance, list):
        return
    first: dict[str, int] = {}
    for position, item in enumerate(instance):
        known = first.setdefault(json.dumps(_plain(item), sort_keys=True), position)
        if known != position:
            yield ValidationError(f"has non-unique elements: {known} and {position} are equal")
            return


def _plain(value: Json) -> Json:
    """`value` with whole numbers as integers: JSON Schema holds 1.0 and 1 to be equal."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case _:
            return value
