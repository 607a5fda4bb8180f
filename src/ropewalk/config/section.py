"""Part of a configuration as a dataclass of plain values; what is wrong with it is told with its line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from ropewalk.config.document import Document, Place
from ropewalk.errors import ConfigError

T = TypeVar("T")


def made(kind: type[T], document: Document, place: Place, found: Any, required: Collection[str] = ()) -> T:
    """A dataclass of plain values, from a mapping."""
    values = dict(mapping(document, place, found))
    known = {f.name: f for f in fields(cast(Any, kind))}
    only(document, place, values, known)
    for name in required:
        if name not in values:
            raise wrong(document, place, f"{place[-1]} has no {name}, which it needs")
    for name, value in values.items():
        expected = str(known[name].type)
        if "float" in expected and isinstance(value, int) and not isinstance(value, bool):
            values[name] = value = float(value)
        wanted: type = float if "float" in expected else int if expected == "int" else bool if expected == "bool" else str
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
            raise wrong(document, (*place, name), f"{name} is {value!r}; expected {words[wanted]}")
    return kind(**values)


def mapping(document: Document, place: Place, found: Any) -> Mapping[str, Any]:
    """The same value, if it is a mapping."""
    if not isinstance(found, dict):
        raise wrong(document, place, f"{place[-1]} is {found!r}; expected a mapping of keys to values")
    return found


def only(document: Document, place: Place, values: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises for a key that is none of these, and names the nearest."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise wrong(document, (*place, key), f"unknown key '{key}'; {hint}")


def wrong(document: Document, place: Place, message: str) -> ConfigError:
    """What is wrong with a key, with its line."""
    return ConfigError(message, path=document.path, line=document.line(place))
