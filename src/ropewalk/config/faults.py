"""What is wrong with the keys and values of a configuration, in words: where, what was given, what was expected."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from ropewalk.config import axolotl
from ropewalk.config.document import Document, Place, dotted
from ropewalk.config.keys import DataSource, Group
from ropewalk.errors import ConfigError

Problem = tuple[Place, str]


def sort_keys(document: Document, model: type[BaseModel]) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """The values of our own keys, the keys of Axolotl's that are not needed, and what cannot be used."""
    own: dict[str, Any] = {}
    ignored: dict[str, str] = {}
    unknown: list[Problem] = []
    refused: dict[str, list[str]] = {}
    inside: list[Problem] = []
    for name in dict.fromkeys([*document.values, *(str(place[0]) for place in document.blank)]):
        value = document.values.get(name)
        if reason := axolotl.refused_value(name, value):
            refused.setdefault(reason, []).append(name)
            continue
        if name in names_of(model):
            if name == "trl":
                value, skipped, cannot = axolotl.sort_trl(value)
                ignored |= {f"trl.{key}": reason for key, reason in skipped.items()}
                inside += [((name, key), f"key 'trl.{key}': {reason}") for key, reason in cannot.items()]
            if name == "fsdp_config":
                value, skipped = axolotl.sort_fsdp(value)
                ignored |= {f"fsdp_config.{key}": reason for key, reason in skipped.items()}
            unknown += _unknown_inside(value, model, (name,))
            inside += _refused_inside(name, value)
            if value is not None:
                own[name] = value
            continue
        answer = axolotl.answer(name, value)
        if answer is None:
            unknown.append(((name,), _unknown(name, [*names_of(model), *axolotl.KEYS])))
            continue
        unknown += (((name, *inner), _unknown(str(inner[-1]), known)) for inner, known in axolotl.strangers(name, value))
        if answer.refused:
            refused.setdefault(answer.reason, []).append(name)
        elif answer.reason:
            ignored[name] = answer.reason
    if "base_model" not in own and len(unknown) > len(own):
        message = "this is no configuration of a training: it names no base_model, and most of its keys are unknown"
        raise ConfigError(message, path=document.path)
    # A method that is refused as a whole explains the keys of its data sets too.
    said = [((names[0],), f"{_keys(names)}: {reason}") for reason, names in refused.items()] or inside
    return own, ignored, unknown + said


def _keys(names: Sequence[str]) -> str:
    return f"key{'s' if len(names) > 1 else ''} " + ", ".join(f"'{name}'" for name in names)


@functools.cache
def names_of(model: type[BaseModel]) -> dict[str, str]:
    """Every name that a key of a group may have -> its field."""
    names: dict[str, str] = {}
    for field, info in model.model_fields.items():
        names[field] = field
        if info.alias:
            names[info.alias] = field
    return names


def _groups(annotation: Any) -> Iterator[type[BaseModel]]:
    """The groups that a type may hold: DataSource in `tuple[DataSource, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Group) and not isinstance(annotation, types.GenericAlias):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _groups(part)


def _unknown_inside(value: Any, model: type[BaseModel], place: Place) -> Iterator[Problem]:
    """Unknown keys of the mappings inside a value of ours."""
    inner = next(_groups(model.model_fields[names_of(model)[str(place[-1])]].annotation), None)
    entries = [((*place, i), entry) for i, entry in enumerate(value)] if isinstance(value, list) else [(place, value)]
    for where, entry in entries:
        if inner is None or not isinstance(entry, dict):
            continue
        for name, deeper in entry.items():
            if name in names_of(inner):
                yield from _unknown_inside(deeper, inner, (*where, name))
            elif inner is not DataSource or name not in axolotl.SOURCE_KEYS:
                yield (*where, name), _unknown(name, list(names_of(inner)))


def _refused_inside(name: str, value: Any) -> Iterator[Problem]:
    """Keys of data sources that are Axolotl's and cannot be used."""
    for index, entry in enumerate(value if isinstance(value, list) else [value]):
        for key in entry if isinstance(entry, dict) and name in ("datasets", "test_datasets", "pretraining_dataset") else ():
            if key in axolotl.SOURCE_KEYS and key not in DataSource.model_fields and entry[key] not in (None, False):
                place: Place = (name, index, key) if isinstance(value, list) else (name, key)
                yield place, f"key '{dotted(place)}': {axolotl.SOURCE_KEYS[key]}"


def _unknown(name: str, known: Sequence[str]) -> str:
    if name in axolotl.MEANT:
        return f"unknown key '{name}'; did you mean '{axolotl.MEANT[name]}'?"
    if lower := [k for k in known if k.lower() == name.lower()]:
        return f"unknown key '{name}'; did you mean '{lower[0]}'?"
    near = get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"; did you mean '{near[0]}'?" if near else "; `ropewalk config docs` lists every key"
    return f"unknown key '{name}'{hint}"


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}


def wrong_values(error: ValidationError, document: Document) -> list[Problem]:
    """Pydantic's findings, joined by key: what was given and what was expected."""
    found: dict[Place, list[str]] = {}
    given: dict[Place, Any] = {}
    for problem in error.errors(include_url=False):
        place = _real(problem["loc"], document.values)
        if problem["type"] == "extra_forbidden" or (problem["type"] == "too_short" and _at(document.values, place)):
            continue  # told already: as unknown, or by the entry that is wrong
        if problem["type"] == "missing":
            above = dotted(problem["loc"][:-1])
            found[tuple(problem["loc"])] = [f"!key '{problem['loc'][-1]}' is missing{f' in {above}' if above else ''}"]
            continue
        given[place] = _at(document.values, place)
        words = found.setdefault(place, [])
        words += [w for w in _expected(dict(problem), given[place]) if w not in words]
    return [
        (
            place,
            words[0][1:]
            if words[0].startswith("!")
            else f"key '{dotted(place)}': {given[place]!r} is not {' or '.join(words)}",
        )
        for place, words in found.items()
    ]


def _expected(problem: dict[str, Any], value: Any) -> list[str]:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        options = [w.strip("'") for w in context["expected"].replace(" or ", ", ").split(", ")]
        near = get_close_matches(str(value), options, n=1, cutoff=0.6)
        return [f"one of {', '.join(options)}" + (f" (did you mean '{near[0]}'?)" if near else "")]
    bounds = {
        "greater_than": "greater than",
        "greater_than_equal": "at least",
        "less_than": "less than",
        "less_than_equal": "at most",
    }
    if kind in bounds:
        return [f"{bounds[kind]} {next(iter(context.values()))}"]
    if kind == "value_error":
        return [str(context["error"]).removeprefix("expected ").replace(", not true or false", "")]
    if kind in ("too_short", "string_too_short"):
        return ["filled: at least one entry is needed"]
    return [_EXPECTED.get(kind.split("_")[0], problem["msg"])]


def _real(loc: Sequence[str | int], values: Any) -> Place:
    """The part of pydantic's location that exists in the document: it puts names of union members in between."""
    place: list[str | int] = []
    inner: Any = values
    for part in loc:
        here = range(len(inner)) if isinstance(inner, list) else inner if isinstance(inner, dict) else ()
        if part in here:
            place.append(part)
            inner = inner[part]
    return tuple(place)


def _at(values: Any, place: Place) -> Any:
    inner: Any = values
    for part in place:
        inner = inner[part]
    return inner


def told(problems: list[Problem], document: Document) -> ConfigError:
    """One error for all problems, in the order of the file."""
    problems.sort(key=lambda problem: document.line(problem[0]) or 0)
    (place, first), rest = problems[0], problems[1:]
    more = "".join(f"; {_short(document, place)}{text}" for place, text in rest)
    text = (first + more).replace("\n", " ")
    if given := document.override(place):
        return ConfigError(f"override '{given}': {text}")
    return ConfigError(text, path=document.path, line=document.line(place))


def _short(document: Document, place: Place) -> str:
    if given := document.override(place):
        return f"override '{given}': "
    line = document.line(place)
    return f"line {line}: " if line else ""
