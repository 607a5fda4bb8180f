"""Gemma 4: <|tool_call>call:name{key:<|"|>text<|"|>,n:1}<tool_call|>, thinking in a channel of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ropewalk.chat.calls import JsonCall
from ropewalk.chat.dialects.dialect import Asked, Dialect, arguments
from ropewalk.chat.dialects.tagged import properties_of, resolved, types_of
from ropewalk.chat.lark import ANYTHING, Lark, expression
from ropewalk.chat.messages import Tool
from ropewalk.chat.parsers import Marked, Parser, held_back

OPENER, CLOSER, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
KEY = re.compile(r'\s*([^\s:{}\[\],<"]+)\s*(?=:)')
SCALAR = re.compile(r"[^\s,{}\[\]<:]+(?=[\s,}\]])")
NO_KEY = re.compile(r'[^\s:{}\[\],<"]*+\s*+[^:\s]')
NO_SCALAR = re.compile(r"[^\s,{}\[\]<:]*+[{\[<:]")
NAMES = {"None": "null", "True": "true", "False": "false"}
DEEPEST = 8


class Gemma(Dialect):
    """Calls in a notation of their own."""

    thinking = ("<|channel>thought\n", "<channel|>")
    after_thinking = ""
    opener = OPENER
    calls = True

    def parser(self, asked: Asked, *, kept: bool) -> Parser:
        names = {tool.name for tool in asked.tools}
        calls = {OPENER: lambda: GemmaCall(names)} if names else {}
        return Marked(self.thinking, calls, streams=kept, **self._plain(asked))

    def stop_ids(self) -> tuple[int, ...]:
        """What a tool answers is not the model's to write."""
        found = self.template.tokenizer.token_to_id("<|tool_response>")
        return tuple(dict.fromkeys([*super().stop_ids(), *([found] if found is not None else [])]))

    def messages(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Where a template knows no role of tools, what they answered stands in the message that called them."""
        if "tool_responses" not in self.source or "tool_call_id" in self.source:
            return messages
        found: list[dict[str, Any]] = []
        for message in messages:
            if message["role"] == "tool" and found and found[-1]["role"] == "assistant":
                answer = {"name": message.get("name", ""), "response": message["content"]}
                found[-1] = {**found[-1], "tool_responses": [*found[-1].get("tool_responses", []), answer]}
            else:
                found.append(message)
        return found

    def call(self, lark: Lark, tool: Tool) -> str:
        schema = arguments(tool)
        return f"{lark.words(f'call:{tool.name}')} {self._object(lark, schema, schema, 0)} {lark.words(CLOSER)}"

    def _value(self, lark: Lark, part: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> str:
        part = resolved(part, root)
        choices = [part["const"]] if "const" in part else part.get("enum")
        if isinstance(choices, list) and choices:
            return lark.either(self._literal(lark, choice) for choice in choices)
        inner = next((part[key] for key in ("anyOf", "oneOf") if isinstance(part.get(key), list)), None)
        if inner and depth < DEEPEST and lark.spend():
            return lark.either(self._value(lark, one, root, depth + 1) for one in inner if isinstance(one, Mapping))
        types = types_of(part, root)
        if not types or depth >= DEEPEST or not lark.spend():
            return self._anything(lark)
        bodies = [self._of_type(lark, kind, part, root, depth) for kind in sorted(types)]
        return lark.either(bodies)

    def _of_type(self, lark: Lark, kind: str, part: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> str:
        if kind == "string":
            return self._text(lark, part)
        if kind == "object":
            return self._object(lark, part, root, depth)
        if kind != "array":
            bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
            return lark.json({"type": kind, **{key: part[key] for key in bounds if key in part and kind != "boolean"}})
        items = part.get("items")
        item = self._value(lark, items, root, depth + 1) if isinstance(items, Mapping) else self._anything(lark)
        least, most = part.get("minItems", 0), part.get("maxItems")
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else max(most - 1, 0)}}}'
        return f'"[" {item} {more} "]"' if least else '"[" "]"' if most == 0 else f'"[" ({item} {more})? "]"'

    def _object(self, lark: Lark, part: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> str:
        """Members in the order of their names, as the template writes them."""
        properties = properties_of(part)
        if not properties:
            return '"{" "}"' if part.get("additionalProperties") is False else self._any_object(lark)
        first = then = '""'  # what may stand here as the first member, and after others
        for name, inner in sorted(properties.items(), reverse=True):
            member = lark.rule(f"{lark.words(name + ':')} {self._value(lark, inner, root, depth + 1)}")
            if name in part.get("required", ()):
                first = lark.rule(f"{member} {then}")
                then = lark.rule(f'"," {member} {then}')
            else:
                first = lark.rule(f"{member} {then} | {first}")
                then = lark.rule(f'("," {member})? {then}')
        return f'"{{" {first} "}}"'

    def _text(self, lark: Lark, part: Mapping[str, Any]) -> str:
        quote = lark.words(QUOTE)
        if not isinstance(self.template.control_parts(QUOTE)[0], int):
            return lark.rule(f"{quote} {lark.until(QUOTE)}")
        return lark.rule(f"{quote} {lark.terminal(expression(part) or ANYTHING)} {quote}")

    def _literal(self, lark: Lark, value: Any) -> str:
        return lark.words(written(value))

    def _any_object(self, lark: Lark) -> str:
        key = lark.terminal("/[A-Za-z_][A-Za-z0-9_-]*/")
        member = lark.rule(f'{key} ":" {self._anything(lark)}')
        return f'"{{" ({member} ("," {member})*)? "}}"'

    def _anything(self, lark: Lark) -> str:
        """Text, numbers and the like, and lists of them."""
        simple = lark.either([self._text(lark, {}), lark.json({"type": ["number", "boolean", "null"]})])
        return lark.either([simple, f'"[" ({simple} ("," {simple})*)? "]"'])


def written(value: Any) -> str:
    """A value in Gemma's notation."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in sorted(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


class GemmaCall(JsonCall):
    """A call while it comes, its input told as JSON."""

    def __init__(self, names: Container[str]) -> None:
        super().__init__(names, r"\s*call:(?P<name>[\w.-]+)\s*(?=\{)", r"\s*" + re.escape(CLOSER), CLOSER, first="c")
        self._quoted = False

    def _read(self) -> None:
        while self._held and not self._object.done and not self.failed and (json_text := self._next()) is not None:
            self._add(self._object.feed(json_text)[0])

    def _next(self) -> str | None:
        """The next part of the text, as JSON; None where more text is needed."""
        held = self._held
        if self._quoted:
            place = held.find(QUOTE)
            if place == 0:
                return self._toggle()
            end = place if place > 0 else len(held) - held_back(held, [QUOTE])
            self._held = held[end:]
            return json.dumps(held[:end], ensure_ascii=False)[1:-1] if end else None
        if held.startswith(QUOTE):
            return self._toggle()
        if QUOTE.startswith(held):
            return None
        if held[0] in "{}[],:" or held[0].isspace():
            self._held = held[1:]
            return held[0] if not held[0].isspace() else " "
        found = (KEY if self._object.wants_key else SCALAR).match(held)
        if found is None:
            # A word that ends in something else than it may is none.
            self.failed = (NO_KEY if self._object.wants_key else NO_SCALAR).match(held) is not None
            return None
        self._held = held[found.end() :]
        return json.dumps(found[1], ensure_ascii=False) if self._object.wants_key else NAMES.get(found[0], found[0])

    def _toggle(self) -> str:
        self._quoted = not self._quoted
        self._held = self._held[len(QUOTE) :]
        return '"'
