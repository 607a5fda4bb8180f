"""Mistral: [TOOL_CALLS]name[ARGS]{...}, or the older list of JSON objects; thinking in [THINK] where there is any."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ropewalk.chat.calls import JsonCall
from ropewalk.chat.dialects.dialect import Asked, Dialect, arguments
from ropewalk.chat.lark import Lark
from ropewalk.chat.messages import MessagesRequest, Tool
from ropewalk.chat.parsers import Marked, Parser
from ropewalk.chat.template import Template

OPENER = "[TOOL_CALLS]"
NAMED = r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)"
LISTED = re.compile(r'\s*\[\s*\{\s*"name"\s*:\s*"(?P<name>[\w.-]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')
LISTED_END = re.compile(r'\s*(?:,\s*"\w+"\s*:\s*"[^"\\]*"\s*)*\}\s*([,\]])')


class Mistral(Dialect):
    """Calls after one marker, each or all."""

    after_thinking = ""
    opener = OPENER
    calls = True

    def __init__(self, template: Template) -> None:
        super().__init__(template)
        if "[THINK]" in self.source:
            self.thinking = ("[THINK]", "[/THINK]")
        self.named = "[ARGS]" in self.source

    def variables(self, request: MessagesRequest) -> dict[str, Any]:
        return {**super().variables(request), "reasoning_effort": "high" if request.thinking else "none"}

    def messages(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Calls under ids of nine characters; thinking as a part of the content, where the template knows such parts."""
        found: list[dict[str, Any]] = []
        for message in messages:
            message = dict(message)
            if "tool_call_id" in message:
                message["tool_call_id"] = short_id(message["tool_call_id"])
            if "tool_calls" in message:
                message["tool_calls"] = [{**call, "id": short_id(call["id"])} for call in message["tool_calls"]]
            if (thought := message.get("reasoning_content")) and "thinking" in self.source:
                said = [{"type": "text", "text": message["content"]}] if message["content"] else []
                message["content"] = [{"type": "thinking", "thinking": thought}, *said]
            if "alternate" in self.source and found and message["role"] == "user" and found[-1]["role"] == "tool":
                # Such a template wants the model's reply next.
                found[-1]["content"] = f"{found[-1]['content']}\n\n{message['content']}"
                continue
            found.append(message)
        return found

    def parser(self, asked: Asked, *, kept: bool) -> Parser:
        names = {tool.name for tool in asked.tools}
        calls = {OPENER: lambda: MistralCall(names)} if names else {}
        return Marked(self.thinking, calls, streams=kept, **self._plain(asked))

    def call(self, lark: Lark, tool: Tool) -> str:
        schema = lark.json(arguments(tool))
        if self.named:
            return f"{lark.words(tool.name + '[ARGS]')} {schema}"
        head = lark.words(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        return f'{head} {schema} "}}"'

    def one_call(self, lark: Lark, tools: Sequence[Tool]) -> str:
        call = super().one_call(lark, tools)
        return call if self.named else f'" "? "[" {call} "]"'

    def all_calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        opener, one = lark.words(OPENER), super().one_call(lark, tools)
        if self.named:
            return f"({opener} {one})+" if parallel else f"{opener} {one}"
        more = f'(", " {one})*' if parallel else ""
        return f'{opener} " "? "[" {one} {more} "]"'  # templates differ in the blank


def short_id(id: str) -> str:
    """Nine letters and digits, the same for the same id."""
    return id if re.fullmatch(r"[a-zA-Z0-9]{9}", id) else hashlib.sha256(id.encode()).hexdigest()[:9]


class MistralCall(JsonCall):
    """A call while it comes, in either notation."""

    def __init__(self, names: Container[str]) -> None:
        super().__init__(names, NAMED)
        self._listed = False

    def _find_name(self) -> None:
        if self._held.lstrip()[:1] == "[" and not self._listed:
            self._listed, self._header = True, LISTED
            self._until = "]"
        super()._find_name()

    def _find_end(self) -> None:
        if not self._listed:
            super()._find_end()
            return
        found = LISTED_END.match(self._held)
        if found is None:
            self.failed = "]" in self._held
            return
        # What follows in the list is as if it began one.
        again = f"{OPENER}[" if found[1] == "," else ""
        self.done, self.rest, self._held = True, again + self._held[found.end() :], ""
