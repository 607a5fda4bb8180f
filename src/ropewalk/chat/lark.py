"""Grammars for replies, in the Lark dialect of llguidance: control tokens by their ids, JSON by schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from ropewalk.errors import BadInput

# Else a model may go on with blanks for ever.
GUIDANCE = {"whitespace_pattern": "[ ]?"}
MOST_PARTS = 2_000
ANYTHING = "/(.|\\n)*/"


class Lark:
    """A grammar under construction."""

    def __init__(self, split: Callable[[str], list[str | int]]) -> None:
        """`split`: a text into plain parts and ids of control tokens."""
        self._split = split
        self._rules: list[str] = []
        self._named: dict[str, str] = {}
        self._parts = 0

    def spend(self) -> bool:
        """Whether another part of a schema may be looked at: one that refers to itself has no end."""
        self._parts += 1
        return self._parts <= MOST_PARTS

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a rule of this body."""
        key = f"{attributes}: {body}"
        if key not in self._named:
            self._named[key] = f"r{len(self._named)}"
            self._rules.append(f"{self._named[key]}{key}")
        return self._named[key]

    def words(self, text: str) -> str:
        """A body that is this text; control tokens in it are themselves."""
        parts = [f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False) for part in self._split(text)]
        return " ".join(parts) or '""'

    def until(self, end: str) -> str:
        """A body that is any text up to this one, and this one."""
        parts = self._split(end)
        if len(parts) == 1 and isinstance(parts[0], int):
            return f"{self.terminal(ANYTHING)} <[{parts[0]}]>"
        return self.rule(ANYTHING, f"[suffix={json.dumps(end)}]")

    def terminal(self, expression: str) -> str:
        """The name of a terminal of this regular expression."""
        key = f": {expression} "
        if key not in self._named:
            self._named[key] = f"T{len(self._named)}"
            self._rules.append(f"{self._named[key]}{key}")
        return self._named[key]

    def json(self, schema: Mapping[str, Any]) -> str:
        """The name of a rule for JSON of this schema."""
        return self.rule("%json " + json.dumps({**schema, "x-guidance": GUIDANCE}))

    def either(self, bodies: Iterable[str]) -> str:
        """The name of a rule for any of these."""
        return self.rule(" | ".join(bodies))

    def text(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {start}", *self._rules])


@lru_cache(maxsize=512)
def _fault(schema: str) -> str:
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=GUIDANCE)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return LLMatcher.validate_grammar(grammar).strip()


@lru_cache(maxsize=512)
def valid(text: str) -> bool:
    """Whether a reply can be kept to this grammar."""
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(text))


def expression(part: Mapping[str, Any], characters: str = "(.|\\n)") -> str | None:
    """The regular expression of a schema of text, as far as it says one; None: any text."""
    pattern = part.get("pattern")
    if isinstance(pattern, str) and re.fullmatch(r"\^[^|\n]*(?<!\\)\$", pattern):
        return "/" + re.sub(r"(?<!\\)/", r"\/", pattern[1:-1]) + "/"
    least, most = part.get("minLength", 0), part.get("maxLength")
    if not least and most is None:
        return None
    return f"/{characters}{{{least},{'' if most is None else most}}}/"


def fault(schema: Mapping[str, Any]) -> str:
    """Why no reply can be kept to this schema, beginning with where in it; empty if one can."""
    found = _fault(json.dumps(schema))
    return f"{_place(schema, schema, '')[-200:]}: {' '.join(found.split())[:300]}" if found else ""


def check(schema: Mapping[str, Any], place: str) -> None:
    """Raises BadInput for a schema that no reply can be kept to."""
    if found := fault(schema):
        raise BadInput(
            f"{place}{found}. Replies can be kept to other schemas than this; leave out or change what is named here"
        )


def _place(schema: Mapping[str, Any], root: Mapping[str, Any], path: str) -> str:
    """The innermost part of a schema that is at fault by itself."""
    common = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for key, part in _parts(schema):
        if _fault(json.dumps({**common, **part})):
            return _place(part, root, f"{path}.{key}")
    return path


def _parts(schema: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Any]] = []
    for key in ("properties", "$defs", "definitions", "patternProperties"):
        inner = schema.get(key)
        found += [(f"{key}.{name}", part) for name, part in inner.items()] if isinstance(inner, Mapping) else []
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        inner = schema.get(key)
        found += [(f"{key}.{i}", part) for i, part in enumerate(inner)] if isinstance(inner, Sequence) else []
    found += [(key, schema[key]) for key in ("items", "additionalProperties") if key in schema]
    return [(key, part) for key, part in found if isinstance(part, Mapping)]
