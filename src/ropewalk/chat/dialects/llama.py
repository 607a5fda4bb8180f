"""Llama 3: a reply that is {"name": ..., "parameters": {...}} and nothing else is a call."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ropewalk.chat.calls import JsonCall
from ropewalk.chat.dialects.dialect import Asked, Dialect, Form, arguments
from ropewalk.chat.dialects.hermes import FOOTER, HEADER
from ropewalk.chat.lark import Lark
from ropewalk.chat.messages import ReplyEvent, Tool
from ropewalk.chat.parsers import Marked, Parser

TAG = "<|python_tag|>"


class Llama(Dialect):
    """Calls as bare JSON."""

    thinking = None
    calls = True
    calls_in_one = False

    def parser(self, asked: Asked, *, kept: bool) -> Parser:
        names = {tool.name for tool in asked.tools}
        if not names or asked.goes_on:
            return Marked(None, **self._plain(asked))
        calls = {opener: lambda opener=opener: _Bare(names, opener == "{") for opener in ("{", TAG)}
        return _AtOnce(None, calls, streams=kept, **self._plain(asked))

    def call(self, lark: Lark, tool: Tool) -> str:
        head = lark.words(f'{{"name": {json.dumps(tool.name)}, "parameters": ')
        return f'{head} {lark.json(arguments(tool))} "}}"'

    def all_calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        return self.one_call(lark, tools)

    def may_call(self, asked: Asked) -> Form | None:
        return None  # its first words may as well be those of an answer


class _Bare(JsonCall):
    """A call whose opener is its first character, or stands before it."""

    def __init__(self, names: set[str], begun: bool) -> None:
        super().__init__(names, HEADER, FOOTER, "}")
        self._held = "{" if begun else ""


class _AtOnce(Marked):
    """A call at the beginning of a reply, or none."""

    _begun = False

    def feed(self, text: str) -> list[ReplyEvent]:
        if not self._begun and (said := (self._held + text).lstrip()):
            self._begun = not TAG.startswith(said) or said == TAG
            if self._begun and not said.startswith(("{", TAG)):
                self._calls = {}
        return super().feed(text)

    def _pass(self, marker: str) -> None:
        super()._pass(marker)
        self._calls = {}
