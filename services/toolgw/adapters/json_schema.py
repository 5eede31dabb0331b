"""JSON Schema (2020-12) as the rules for arguments.

The library takes 7 MB and a tenth of a second: it is loaded when something is checked for the first time, so that a
tool gateway without work does without it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import orjson

from services.toolgw.domain.tool import Json

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

SHOWN_VIOLATIONS: Final = 8
SHOWN_CHARACTERS: Final = 200


class SchemaInvalid(ValueError):
    """A tool's `parameters` are no JSON Schema of an object; the text says where."""


class JsonSchemaRules:
    """Validators, made once per schema. References to other documents are not followed: nothing is fetched."""

    def __init__(self) -> None:
        self._validators: dict[bytes, Draft202012Validator] = {}

    async def violations(self, parameters: Mapping[str, Json], arguments: Mapping[str, Json]) -> Sequence[str]:
        """What does not fit, each with its place; empty when everything does."""
        if not self._validators:
            await asyncio.to_thread(import_module, "jsonschema")
        from referencing.exceptions import Unresolvable

        try:
            found = list(itertools.islice(self._validator(parameters).iter_errors(dict(arguments)), SHOWN_VIOLATIONS))
        except Unresolvable as error:
            return [f"the tool's own schema refers to what is not in it: {error}"]
        return [f"{error.json_path}: {error.message[:SHOWN_CHARACTERS]}" for error in found]

    def _validator(self, parameters: Mapping[str, Json]) -> Draft202012Validator:
        from jsonschema import Draft202012Validator
        from referencing import Registry

        digest = orjson.dumps(parameters, option=orjson.OPT_SORT_KEYS)
        validator = self._validators.get(digest)
        if validator is None:
            registry: Registry[Any] = Registry()
            validator = self._validators[digest] = Draft202012Validator(dict(parameters), registry=registry)
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
