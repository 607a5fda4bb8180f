"""Qwen3-Coder, Qwen3.5 and Qwen3.6: <tool_call><function=name><parameter=x>...</parameter></function></tool_call>.

What stands in a parameter is text; the tool's schema says what is meant by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ropewalk.chat.calls import is_object
from ropewalk.chat.dialects.dialect import Asked, Dialect, arguments
from ropewalk.chat.lark import Lark, expression
from ropewalk.chat.messages import Tool
from ropewalk.chat.parsers import Marked, Parser, held_back

OPENER, CLOSER = "<tool_call>", "</tool_call>"
FUNCTION = re.compile(r"\s*<function=(?P<name>[^>\n]+)>\s*")
PARAMETER = re.compile(r"\s*<parameter=(?P<name>[^>\n]+)>\n?")
END = re.compile(r"\s*</function>\s*</tool_call>")
DEEPEST = 8
VALUE_ENDS = "</parameter>"


class Tagged(Dialect):
    """Calls in tags, their arguments as text."""

    opener = OPENER
    calls = True

    def parser(self, asked: Asked, *, kept: bool) -> Parser:
        schemas = {tool.name: tool.schema for tool in asked.tools}
        calls = {OPENER: lambda: TaggedCall(schemas)} if schemas else {}
        return Marked(self.thinking, calls, streams=kept, **self._plain(asked))

    def call(self, lark: Lark, tool: Tool) -> str:
        schema = arguments(tool)
        properties = properties_of(schema)
        parameters = []
        for name, part in properties.items():
            body = lark.rule(f"{lark.words(f'<parameter={name}>{chr(10)}')} {self._value(lark, part, schema)}")
            parameters.append(body if name in schema.get("required", ()) else f"{body}?")
        if not properties and schema.get("additionalProperties", True) is not False:
            name = lark.terminal("/[A-Za-z_][A-Za-z0-9_.-]*/")
            parameters.append(f'("<parameter=" {name} ">\\n" {lark.until(ENDING)})*')
        head, foot = lark.words(f"\n<function={tool.name}>\n"), lark.words(f"</function>\n{CLOSER}")
        return f"{head} {' '.join(parameters)} {foot}"

    def _value(self, lark: Lark, part: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> str:
        part, types = resolved(part, root), types_of(part, root)
        if "string" in types and len(types) > 1 and depth < DEEPEST and lark.spend():  # texts bare, all else as JSON
            return lark.either(self._value(lark, one, root, depth + 1) for one in _apart(part))
        if types != {"string"}:
            common = {key: root[key] for key in ("$defs", "definitions") if key in root}
            return f"{lark.json({**common, **part})} {lark.words(ENDING)}"
        choices = [part["const"]] if "const" in part else part.get("enum")
        if choices:
            return f"{lark.either(lark.words(str(choice)) for choice in choices)} {lark.words(ENDING)}"
        # Without what begins a tag, so that the length is that of the whole value.
        if (limited := expression(part, "[^<]")) is not None:
            return f"{lark.terminal(limited)} {lark.words(ENDING)}"
        return lark.until(ENDING)


ENDING = f"\n{VALUE_ENDS}\n"


class TaggedCall:
    """A call while its tags come."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self.name = self.input = self.rest = ""
        self.done = self.failed = False
        self._held = self._whole = ""
        self._said: set[str] = set()  # parameters
        self._kind = ""  # of the value at hand: string (told as it comes), other
        self._types: set[str] = set()
        self._key = ""  # of the value at hand, as JSON

    def feed(self, text: str) -> None:
        """More of the text."""
        self._held += text
        while not self.done and not self.failed and self._step():
            pass

    def finish(self) -> None:
        """The text is over."""
        if not self.done and not self.failed:
            left = self._held.strip()
            if self.name and not self._kind and left and _begins(left):
                self._end("")
            else:
                self.failed = True

    def close(self) -> str:
        """What makes the input JSON, where it is cut off."""
        return ('"' if self._kind == "string" else "") + ("}" if self._whole else "{}")

    def _step(self) -> bool:
        if not self.name:
            found = FUNCTION.match(self._held)
            if found is None or found.end() == len(self._held):  # more blanks may come
                self.failed = found is None and ("\n" in self._held.lstrip() or CLOSER in self._held)
                return False
            self.name = found["name"].strip()
            self.failed = self.name not in self._schemas
            if self.failed:
                self.name = ""
            self._held = self._held[found.end() :]
            return True
        return self._value() if self._kind else self._between()

    def _between(self) -> bool:
        if found := END.match(self._held):
            self._end(self._held[found.end() :])
            return True
        found = PARAMETER.match(self._held)
        if found is None or (found.end() == len(self._held) and not found[0].endswith("\n")):
            left = self._held.lstrip()
            self.failed = found is None and not _may_be_tag(left)
            return False
        name = found["name"].strip()
        if name in self._said:
            self.failed = True
            return False
        self._held = self._held[found.end() :]
        schema = self._schemas[self.name]
        part = properties_of(schema).get(name, {})
        self._types = types_of(part, schema) if isinstance(part, Mapping) else set()
        self._kind = "string" if self._types == {"string"} else "other"
        self._key = (", " if self._said else "{") + json.dumps(name, ensure_ascii=False) + ": "
        self._tell(self._key + '"' if self._kind == "string" else "")
        self._said.add(name)
        return True

    def _value(self) -> bool:
        place = self._held.find(VALUE_ENDS)
        if self._kind == "string":
            if place < 0:
                kept = max(held_back(self._held, [VALUE_ENDS]), held_back(self._held, ["\n" + VALUE_ENDS]))
                self._tell(_escaped(self._held[: len(self._held) - kept]))
                self._held = self._held[len(self._held) - kept :]
                return False
            self._tell(_escaped(self._held[:place].removesuffix("\n")) + '"')
        elif place < 0:
            return False
        else:
            value = meant(self._held[:place].removesuffix("\n"), self._types)
            self._tell(self._key + json.dumps(value, ensure_ascii=False))
        self._kind = ""
        self._held = self._held[place + len(VALUE_ENDS) :]
        return True

    def _end(self, rest: str) -> None:
        self._tell("}" if self._said else "{}")
        self.rest, self._held = rest, ""
        self.done = is_object(self._whole)
        self.failed = not self.done

    def _tell(self, text: str) -> None:
        self.input += text
        self._whole += text


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _may_be_tag(text: str) -> bool:
    """Whether a parameter or the end may still come of this."""
    squeezed = re.sub(r"\s+", "", text)
    return (
        "<parameter=".startswith(text)
        or (text.startswith("<parameter=") and ">" not in text and "\n" not in text)
        or (text.startswith("<parameter=") and text.endswith(">"))
        or (text.startswith("</") and "</function></tool_call>".startswith(squeezed))
    )


def _begins(text: str) -> bool:
    """Whether this is the end of a call, as far as it goes."""
    return text.startswith("</function>") and "</function></tool_call>".startswith(re.sub(r"\s+", "", text))


def _apart(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A schema of several types as schemas of one, or of texts and of all else."""
    for key in ("anyOf", "oneOf"):
        inner = part.get(key)
        if isinstance(inner, list):
            return [one for one in inner if isinstance(one, Mapping)]
    choices = part.get("enum")
    if isinstance(choices, list):
        texts = [choice for choice in choices if isinstance(choice, str)]
        return [{"enum": texts}, {"enum": [choice for choice in choices if not isinstance(choice, str)]}]
    others = [kind for kind in part["type"] if kind != "string"]
    return [{**part, "type": "string"}, {**part, "type": others}]


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return {k: v if isinstance(v, Mapping) else {} for k, v in found.items()} if isinstance(found, Mapping) else {}


def resolved(part: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or what its reference within the root stands for."""
    for _ in range(10):
        reference = part.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        found: Any = root
        for key in reference[2:].split("/"):
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            break
        part = found
    return part


def types_of(part: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The types that a schema allows, as far as it says."""
    part = resolved(part, root)
    declared = part.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {kind for kind in declared if isinstance(kind, str)}
    choices = [part["const"]] if "const" in part else part.get("enum")
    if isinstance(choices, list) and choices:
        return {_KINDS.get(type(choice), "object") for choice in choices}
    found: set[str] = set()
    for key in ("anyOf", "oneOf"):
        inner = part.get(key)
        for choice in inner if isinstance(inner, list) and depth < 10 else ():
            if isinstance(choice, Mapping):
                found |= types_of(choice, root, depth + 1)
    return found


_KINDS: dict[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}


def meant(text: str, types: set[str]) -> Any:
    """What a text stands for where these types are allowed; the text itself if it is none of them, or nothing is known."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    kind = _KINDS.get(type(value), "object")
    if kind == "string" and "string" in types:
        return text  # quotes are its own
    if kind == "number" and "number" not in types and "integer" in types and float(value).is_integer():
        return int(value)
    fits = kind in types or (kind == "integer" and "number" in types)
    return value if fits or (not types and kind != "string") else text


def _refuse(name: str) -> Any:
    raise ValueError(name)
