"""The one door to jsonschema: whether a text is JSON that a JSON Schema allows. Nothing is fetched, and patterns are RE2's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from ropewalk import patterns

Schema = Mapping[str, Any] | bool
KEPT = 64
SHOWN = 160  # characters of what is wrong


def breach(schema: Schema, text: str) -> str | None:
    """Where and how a text is not what the schema allows; None where it is."""
    try:
        error = best_match(_validator(json.dumps(schema)).iter_errors(json.loads(text, parse_constant=_no_json)))
    except ValueError as fault:
        return f"no JSON: {str(fault)[:SHOWN]}"
    except RecursionError:
        return "nested too deeply to be read"
    return None if error is None else f"{error.json_path}: {error.message[:SHOWN]}"


def faults(schema: Schema) -> Iterator[str]:
    """What is wrong with a schema, and what to write instead."""
    try:
        validator = _validator(json.dumps(schema))
        for key, value in _pairs(schema):
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                validator._resolver.lookup(value)
            elif key == "pattern" and isinstance(value, str):
                yield from _wrong([value])
            elif key == "patternProperties" and isinstance(value, Mapping):
                yield from _wrong(value)
            elif key == "unevaluatedProperties":
                yield "the schema has 'unevaluatedProperties', which is not supported; write additionalProperties"
    except SchemaError as error:
        yield f"the schema is none: {error.json_path}: {error.message[:SHOWN]}"
    except Unresolvable as error:
        yield f"the schema refers to '{error.ref}', which is not in it; write it under '$defs'"
    except RecursionError:
        yield "the schema is nested too deeply"


def _wrong(several: list[str] | Mapping[str, Any]) -> Iterator[str]:
    return (said for pattern in several if (said := patterns.fault(pattern)))


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _pairs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner)


def _pattern(validator: Any, wanted: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not patterns.compiled(wanted).search(instance):
        yield ValidationError(f"{instance[:SHOWN]!r} does not match {wanted!r}")


def _pattern_properties(validator: Any, wanted: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[ValidationError]:
    for expression, inner in wanted.items() if isinstance(instance, dict) else ():
        for key in instance:
            if patterns.compiled(expression).search(key):
                yield from validator.descend(instance[key], inner, path=key, schema_path=expression)


def _additional(validator: Any, wanted: Any, instance: Any, schema: Mapping[str, Any]) -> Iterator[ValidationError]:
    for key in instance if isinstance(instance, dict) else ():
        named = key in schema.get("properties", {})
        if named or any(patterns.compiled(one).search(key) for one in schema.get("patternProperties", {})):
            continue
        if wanted is False:
            yield ValidationError(f"{key[:SHOWN]!r} is not among its properties")
        else:
            yield from validator.descend(instance[key], wanted, path=key)


OWN = {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional}


@lru_cache(maxsize=KEPT)
def _validator(schema: str) -> Any:
    parsed = json.loads(schema)
    kind = validator_for(parsed, default=Draft202012Validator)
    kind.check_schema(parsed)
    return extend(kind, OWN)(parsed, registry=Registry())


def _no_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
