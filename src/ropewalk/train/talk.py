"""What is said in an episode, as ids: by a model's own chat template, and in the way in which its family calls tools.

Nothing that stands already is tokenised again, since that may give other ids than those that were sampled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from ropewalk.chat.dialects.dialect import Asked
from ropewalk.chat.dialects.known import dialect_of
from ropewalk.chat.messages import BlockEnded, BlockStarted, Delta, MessagesRequest, Text, Tool, ToolUse, Turn
from ropewalk.chat.template import Template
from ropewalk.errors import BadInput, ModelError
from ropewalk.train.environment_tools import ToolCall
from ropewalk.train.reward_functions import Message

REPLY = "271828182845904523536"  # stands for a reply where only what a template writes after one is wanted
ASKED: Message = {"role": "user", "content": "?"}
TAIL = 200  # characters of a prompt's end, which say whether a reply begins within thinking


class TemplateTalk:
    """A model's own chat template, and the tools that it may call."""

    def __init__(self, template: Template, tools: Sequence[Tool] = ()) -> None:
        self.template, self.dialect = template, dialect_of(template)
        if tools and not self.dialect.calls:
            raise ModelError(
                "the chat template of this model writes calls of tools in no way that is known here; "
                "name another template, or an environment without tools"
            )
        shown = [
            {"type": "function", "function": {"name": one.name, "description": one.description, "parameters": one.schema}}
            for one in tools
        ]
        self._shown, self._tools = shown, self.dialect.tools(shown) or None
        request = MessagesRequest("", 1, (Turn("user", (Text("?"),)),), tools=tuple(tools), thinking=True)
        self._asked = Asked(request, tuple(tools), self._text([ASKED], going_on=True)[-TAIL:])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a reply ends, or its calls."""
        return self.dialect.stop_ids() if self._shown else self.template.stop_ids

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """The whole prompt."""
        return self.template.encode(self._text(messages, going_on=True))

    def follow(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """What stands between a reply, whose last id is `last`, and the next: the reply's end, the messages, the next one's beginning."""
        said = {"role": "assistant", "content": REPLY}
        text = self._text([ASKED, said, *messages], going_on=True).partition(REPLY)[2]
        return self._behind(self.template.encode(text), last)

    def calls(self, ids: Sequence[int]) -> list[ToolCall]:
        """The calls of tools in a reply."""
        if not self._asked.tools:
            return []
        ends = self.dialect.stop_ids()
        parser = self.dialect.parser(self._asked, kept=False)
        said = self.template.decode(ids[:-1] if ids and ids[-1] in ends else ids, skip_special_tokens=False)
        found: list[ToolCall] = []
        name, written = "", ""
        for event in [*parser.feed(said), *parser.finish()]:
            match event:
                case BlockStarted(block):
                    name, written = (block.name, "") if isinstance(block, ToolUse) else ("", "")
                case Delta(text):
                    written += text
                case BlockEnded() if name:
                    found.append(ToolCall(name, _object(written)))
        # Some templates can show one call of a reply only.
        return found if self.dialect.calls_in_one else found[:1]

    def answer(self, calls: Sequence[ToolCall], results: Sequence[str], last: int | None) -> list[int]:
        """What stands between a reply that called tools and the next: its end, what the tools gave, the next one's beginning."""
        whole = self._answered(calls, results)
        named = _shared(whole, self._answered([*calls[:-1], ToolCall(REPLY, calls[-1].arguments)], results))
        shared = _shared(whole, self._answered(calls, [REPLY] * len(calls)))  # all that stands before the first result
        ends = self.dialect.stop_ids()
        over = next((place for place in range(named, shared) if whole[place] in ends), None)
        if over is None:  # answers stand in the turn of the call
            over = _shared(whole, self.template.encode(self._text([ASKED, _called(calls)])))
        if not named < over <= shared:
            raise BadInput("the chat template shows neither a call nor what it gave; name another one")
        return self._behind(whole[over:], last)

    def _answered(self, calls: Sequence[ToolCall], results: Sequence[str]) -> list[int]:
        given = [
            {"role": "tool", "tool_call_id": _id(number), "name": call.name, "content": result}
            for number, (call, result) in enumerate(zip(calls, results, strict=True))
        ]
        return self.template.encode(self._text([ASKED, _called(calls), *given], going_on=True))

    def read(self, ids: Sequence[int]) -> str:
        """The text of a reply."""
        return self.template.decode(ids)

    def _behind(self, ids: list[int], last: int | None) -> list[int]:
        # The end that the model has said itself is not said twice.
        return ids[1:] if ids and ids[0] == last else ids

    def _text(self, messages: Sequence[Message], *, going_on: bool = False) -> str:
        if self._shown:
            messages = self.dialect.messages([dict(message) for message in messages], self._shown)
        return self.template.render_text(messages, tools=self._tools, add_generation_prompt=going_on)


def _called(calls: Sequence[ToolCall]) -> Message:
    """A reply that is these calls."""
    functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    listed = [{"id": _id(number), "type": "function", "function": one} for number, one in enumerate(functions)]
    return {"role": "assistant", "content": "", "tool_calls": listed}


def _id(number: int) -> str:
    """Of a call: nine characters, as some templates want it."""
    return f"call{number:05d}"


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _object(written: str) -> Mapping[str, Any]:
    """The arguments of a call; what is no object are none, of which the tool will complain."""
    try:
        found = json.loads(written)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
