"""What a family of models writes beside text: how it thinks, how it calls tools, and what its chat template must be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ropewalk.chat.lark import Lark, fault
from ropewalk.chat.messages import MessagesRequest, Tool
from ropewalk.chat.parsers import Marked, Parser
from ropewalk.chat.template import Template


@dataclass(frozen=True)
class Form:
    """What the engine is to keep a reply to."""

    kind: Literal["json_schema", "lark", "without"]
    text: str
    after: tuple[int, ...] = ()  # from these ids on; of `without`, the ids that may not come
    again: bool = False  # each time that they come


@dataclass(frozen=True)
class Asked:
    """A request as far as the form of its reply goes."""

    request: MessagesRequest
    tools: tuple[Tool, ...]  # that may be called
    tail: str  # the end of the prompt, as text

    @property
    def goes_on(self) -> bool:
        """Whether the caller has begun the reply."""
        return self.request.turns[-1].role == "assistant"


class Dialect:
    """A family without anything of its own: text, and thinking between <think> and </think>."""

    thinking: tuple[str, str] | None = ("<think>", "</think>")
    after_thinking: str = "\n\n"
    opener: str = ""  # of a call; what it is told by
    calls_in_one: bool = True  # whether the template renders several calls of one message
    calls: bool = False  # whether it calls tools at all
    plain_reply: bool = True  # whether a reply may be text from its first word on

    def __init__(self, template: Template) -> None:
        self.template = template
        self.source = template.needed.source

    # -- rendering

    def variables(self, request: MessagesRequest) -> dict[str, Any]:
        """What the chat template is told of how to reply."""
        return {"enable_thinking": request.thinking, "thinking": request.thinking}

    def messages(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as this family's template wants them."""
        return messages

    def tools(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The tools that the template is to show."""
        return tools

    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a reply ends."""
        return self.template.stop_ids

    # -- reading

    def parser(self, asked: Asked, *, kept: bool) -> Parser:
        """`kept`: a grammar keeps calls whole, so that they can be told while they come."""
        return Marked(self.thinking, **self._plain(asked))

    def _plain(self, asked: Asked) -> dict[str, Any]:
        return {
            "thinks_first": self.thinks_first(asked),
            "shows_thinking": asked.request.thinking,
            "goes_on": asked.goes_on,
        }

    def thinks_first(self, asked: Asked) -> bool:
        """Whether the prompt ends inside of thinking."""
        return self.thinking is not None and asked.tail.rstrip().endswith(self.thinking[0].rstrip())

    # -- keeping to a form

    def lark(self) -> Lark:
        return Lark(self.template.control_parts)

    def call(self, lark: Lark, tool: Tool) -> str:
        """A body for a call of this tool, without its opener."""
        raise NotImplementedError

    def one_call(self, lark: Lark, tools: Sequence[Tool]) -> str:
        """A body for a call of any of these tools, without its opener."""
        return lark.either(self.call(lark, tool) for tool in tools)

    def all_calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """A body for a reply that is calls."""
        call = lark.rule(f"{lark.words(self.opener)} {self.one_call(lark, tools)}")
        return f'{call} ("\\n" {call})*' if parallel else call

    def must_call(self, asked: Asked) -> Form:
        """Calls, after whatever is thought before."""
        lark = self.lark()
        return self._thought_before(asked, lark, self.all_calls(lark, asked.tools, parallel=asked.request.tool_choice.parallel))

    def may_call(self, asked: Asked) -> Form | None:
        """Text, or calls from their opener on, if that is a control token: other words may be said in many ways."""
        parts = self.template.control_parts(self.opener)
        if len(parts) != 1 or not isinstance(parts[0], int):
            return None
        lark = self.lark()
        return Form("lark", lark.text(self.one_call(lark, asked.tools)), (parts[0],), again=asked.request.tool_choice.parallel)

    def must_not_call(self) -> Form | None:
        """Text without calls."""
        parts = self.template.control_parts(self.opener) if self.opener else []
        return Form("without", "", (parts[0],)) if len(parts) == 1 and isinstance(parts[0], int) else None

    def structured(self, asked: Asked, schema: Mapping[str, Any]) -> Form:
        """JSON of a schema, or calls where there are tools."""
        lark = self.lark()
        bodies = [lark.json(schema)]
        if asked.tools and self.calls:
            bodies.append(self.all_calls(lark, asked.tools, parallel=asked.request.tool_choice.parallel))
        return self._thought_before(asked, lark, lark.either(bodies))

    def _thought_before(self, asked: Asked, lark: Lark, body: str) -> Form:
        if self.thinking is None:
            return Form("lark", lark.text(body))
        opening, closing = self.thinking
        blank = f"({lark.words(self.after_thinking)})?" if self.after_thinking else ""
        thought = f"{lark.until(closing)} {blank}"
        if self.thinks_first(asked):
            return Form("lark", lark.text(f"{thought} {body}"))
        if asked.request.thinking:
            return Form("lark", lark.text(f"({lark.words(opening)} {thought})? {body}"))
        return Form("lark", lark.text(body))


def arguments(tool: Tool) -> Mapping[str, Any]:
    """The schema that a call's input is kept to: any object, where no reply could be kept to the tool's own."""
    return {"type": "object"} if fault(tool.schema) else tool.schema
