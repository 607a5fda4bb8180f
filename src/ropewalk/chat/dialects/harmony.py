"""gpt-oss: every message has a channel. analysis is thinking, final is text, commentary to=functions.x is a call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.chat.calls import JsonCall
from ropewalk.chat.dialects.dialect import Asked, Dialect, Form, arguments
from ropewalk.chat.lark import ANYTHING, Lark
from ropewalk.chat.messages import MessagesRequest, ReplyEvent, Tool
from ropewalk.chat.parsers import Blocks, Parser, held_back

START, CHANNEL, MESSAGE, END, CALL, RETURN = (
    f"<|{word}|>" for word in ("start", "channel", "message", "end", "call", "return")
)
EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
ENDS = (END, CALL, RETURN, START, CHANNEL)


class Harmony(Dialect):
    """Messages in channels."""

    thinking = None
    calls = True
    calls_in_one = False
    plain_reply = False

    def variables(self, request: MessagesRequest) -> dict[str, Any]:
        asked = EFFORTS.get(request.effort, "medium" if request.thinking else "low")
        return {**super().variables(request), "reasoning_effort": asked}

    def stop_ids(self) -> tuple[int, ...]:
        """A message ends where its channel does, and a reply goes on in the next."""
        find = self.template.tokenizer.token_to_id
        stops = [id for id in self.template.stop_ids if id != find(END)]
        return tuple(dict.fromkeys([*stops, *(id for id in (find(RETURN), find(CALL)) if id is not None)]))

    def messages(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A message that calls says what it says as its analysis."""
        found = []
        for message in messages:
            message = dict(message)
            if message.get("tool_calls") and message["content"]:
                message.pop("thinking", None)
            found.append(message)
        return found

    def parser(self, asked: Asked, *, kept: bool) -> Parser:
        return HarmonyParser(
            {tool.name for tool in asked.tools},
            streams=kept,
            shows_thinking=asked.request.thinking,
            goes_on=asked.goes_on,
            begun=asked.tail.rstrip().endswith(f"{START}assistant"),
        )

    def call(self, lark: Lark, tool: Tool) -> str:
        head = lark.words(f"{CHANNEL}commentary to=functions.{tool.name} <|constrain|>json{MESSAGE}")
        return f"{head} {lark.json(arguments(tool))}"

    def _thoughts(self, lark: Lark, names: Sequence[str] = ("analysis", "commentary")) -> str:
        until, again = lark.until(END), lark.words(f"{START}assistant")
        channels = [f"{lark.words(f'{CHANNEL}{name}{MESSAGE}')} {until} {again}" for name in names]
        return f"{lark.either(channels)}*"

    def must_call(self, asked: Asked) -> Form:
        lark = self.lark()
        return Form("lark", lark.text(f"{self._thoughts(lark)} {self.one_call(lark, asked.tools)}"))

    def may_call(self, asked: Asked) -> Form:
        lark = self.lark()
        bodies = [self.one_call(lark, asked.tools), self._final(lark, lark.terminal(ANYTHING))]
        return Form("lark", lark.text(f"{self._thoughts(lark)} {lark.either(bodies)}"))

    def must_not_call(self) -> Form | None:
        lark = self.lark()
        return Form("lark", lark.text(f"{self._thoughts(lark)} {self._final(lark, lark.terminal(ANYTHING))}"))

    def structured(self, asked: Asked, schema: Mapping[str, Any]) -> Form:
        lark = self.lark()
        bodies = [self._final(lark, lark.json(schema)), *([self.one_call(lark, asked.tools)] if asked.tools else [])]
        return Form("lark", lark.text(f"{self._thoughts(lark, ['analysis'])} {lark.either(bodies)}"))

    def _final(self, lark: Lark, body: str) -> str:
        return lark.rule(f"{lark.words(f'{CHANNEL}final{MESSAGE}')} {body}")


class HarmonyParser:
    """Messages, one after another: a header that says what each is, and its text."""

    def __init__(self, names: set[str], *, streams: bool, shows_thinking: bool, goes_on: bool, begun: bool) -> None:
        """`begun`: the prompt ends in the beginning of a header."""
        self._names, self._streams = names, streams
        self._blocks = Blocks(shows_thinking=shows_thinking, goes_on=goes_on)
        self._held = ""
        self._header: str | None = "" if begun else None  # as far as it has come, while one is read
        self._kind = "text"  # of the message at hand: text, thinking, call
        self._call: JsonCall | None = None
        self._raw = ""  # of the call at hand, its header included
        self._told = False

    @property
    def called(self) -> bool:
        """Whether the reply calls a tool."""
        return self._blocks.called

    def feed(self, text: str) -> list[ReplyEvent]:
        """More of the reply."""
        self._held += text
        while self._step():
            pass
        return self._blocks.take()

    def finish(self) -> list[ReplyEvent]:
        """What was held back, and the end of the block at hand."""
        while self._step():
            pass
        if self._header is not None:
            self._blocks.text(self._header + self._held)
        elif self._call is not None:
            self._more(self._held)
            self._end_call()
        else:
            self._say(self._held)
        self._held, self._header = "", None
        self._blocks.end(over=True)
        return self._blocks.take()

    def _step(self) -> bool:
        if self._header is not None:
            place = self._held.find(MESSAGE)
            if place < 0:
                return False
            header, self._header = self._header + self._held[:place], None
            self._held = self._held[place + len(MESSAGE) :]
            self._begin(header)
            return True
        found = [(place, marker) for marker in ENDS if (place := self._held.find(marker)) >= 0]
        if not found:
            count = len(self._held) - held_back(self._held, ENDS)
            self._more(self._held[:count])
            self._held = self._held[count:]
            return False
        place, marker = min(found)
        self._more(self._held[:place])
        self._end_call()
        self._blocks.end()
        self._kind = "text"
        self._held = self._held[place + len(marker) :]
        if marker in (START, CHANNEL):
            self._header = marker
        return True

    def _begin(self, header: str) -> None:
        channel = re.search(r"<\|channel\|>\s*(\w+)", header)
        recipient = re.search(r"\bto=functions\.([\w.-]+)", header)
        self._kind = "thinking" if channel is not None and channel[1] == "analysis" else "text"
        if recipient is not None:
            self._call, self._raw = JsonCall(self._names, "(?!)", r"\s*$", "", name=recipient[1]), header + MESSAGE
            self._kind = "call"

    def _more(self, text: str) -> None:
        if self._call is None:
            self._say(text)
            return
        self._raw += text
        self._call.feed(text)
        if self._call.failed or self._call.rest.strip():
            self._spoil()
        elif self._streams:
            self._tell(self._call)

    def _end_call(self) -> None:
        """The message of a call is over."""
        call = self._call
        if call is None:
            return
        call.finish()
        if call.failed:
            self._spoil()
            return
        self._tell(call)
        self._blocks.called = True
        self._forget()

    def _tell(self, call: JsonCall) -> None:
        if not self._told:
            self._blocks.call(call.name)
            self._told = True
        self._blocks.input(call.input)
        call.input = ""

    def _spoil(self) -> None:
        """What looked like a call is none."""
        if self._told and self._call is not None:
            self._blocks.input(self._call.input + self._call.close())
        else:
            self._blocks.text(self._raw)
        self._forget()

    def _forget(self) -> None:
        if self._told:
            self._blocks.end()
        self._call, self._kind, self._told = None, "text", False

    def _say(self, text: str) -> None:
        if self._kind == "thinking":
            self._blocks.thinking(text)
        else:
            self._blocks.text(text)
