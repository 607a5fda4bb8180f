"""Qwen2.5, Qwen3 and whoever writes like them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, thinking in <think>.

Models whose chat template knows no tools are told of them in the same words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.chat.calls import JsonCall
from ropewalk.chat.dialects.dialect import Asked, Dialect, arguments
from ropewalk.chat.lark import Lark
from ropewalk.chat.messages import Tool
from ropewalk.chat.parsers import Marked, Parser

OPENER, CLOSER = "<tool_call>", "</tool_call>"
HEADER = r'\s*\{\s*"name"\s*:\s*"(?P<name>[\w.-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
FOOTER = r"\s*\}\s*"


class Hermes(Dialect):
    """Calls as JSON between two markers."""

    opener = OPENER
    calls = True

    def parser(self, asked: Asked, *, kept: bool) -> Parser:
        names = {tool.name for tool in asked.tools}
        calls = {OPENER: lambda: JsonCall(names, HEADER, FOOTER + re.escape(CLOSER), CLOSER, first="{")} if names else {}
        return Marked(self.thinking, calls, streams=kept, **self._plain(asked))

    def call(self, lark: Lark, tool: Tool) -> str:
        head = lark.words(f'\n{{"name": {json.dumps(tool.name)}, "arguments": ')
        return f"{head} {lark.json(arguments(tool))} {lark.words('}' + chr(10) + CLOSER)}"


class Told(Hermes):
    """A template that knows no tools: they are described in the system message, and what they answered comes from the user."""

    def tools(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return []

    def messages(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        found = [self._flat(message) for message in messages]
        if tools:
            described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            told = (
                f"These tools can be called:\n<tools>\n{described}\n</tools>\n"
                "A call is written as a JSON object with the tool's name and its arguments:\n"
                f'{OPENER}\n{{"name": "...", "arguments": {{...}}}}\n{CLOSER}'
            )
            if found and found[0]["role"] == "system":
                found[0] = {**found[0], "content": f"{found[0]['content']}\n\n{told}"}
            else:
                found.insert(0, {"role": "system", "content": told})
        return _joined(found)

    def _flat(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] == "tool":
            return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        calls = [
            f"{OPENER}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSER}" for call in message.get("tool_calls", ())
        ]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**kept, "content": "\n".join([*([message["content"]] if message["content"] else []), *calls])}


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Users' messages that follow one another as one: many templates want them to take turns."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if found and message["role"] == found[-1]["role"] == "user":
            found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n{message['content']}"}
        else:
            found.append(message)
    return found
